"""Where the standard variables send spans, in words."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit, urlunsplit

from rich.text import Text

from otel_npu import semconv

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import Console

    from otel_npu.cli.demo.traces import Slow, Traces

_DEFAULT_ENDPOINTS: Final = {"grpc": "http://localhost:4317", "http/protobuf": "http://localhost:4318"}
_SERVICE: Final = "otel-npu-demo"
_JAEGER: Final = "docker run --rm -p 16686:16686 -p 4317:4317 jaegertracing/jaeger:2.20.0"
_JAEGER_ENDPOINT: Final = "OTEL_EXPORTER_OTLP_ENDPOINT=http://localhost:4317"
_JAEGER_PAGE: Final = "http://localhost:16686"


@dataclass(frozen=True)
class Destination:
    """What the environment says of where spans go. What it holds is checked by the relay, not here.

    Attributes:
        exporters: `OTEL_TRACES_EXPORTER`.
        endpoint: The OTLP endpoint for traces.
        protocol: The OTLP protocol for traces.
    """

    exporters: str
    endpoint: str
    protocol: str

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Destination:
        """Read the standard variables."""

        def first(*variables: str, default: str) -> str:
            return next((value for name in variables if (value := environment.get(name, "").strip())), default)

        return cls(
            exporters=first("OTEL_TRACES_EXPORTER", default=""),
            endpoint=first("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT", default=""),
            protocol=first("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL", default="grpc"),
        )

    @property
    def given(self) -> bool:
        """Whether spans are to go anywhere; otherwise the demo keeps them to itself."""
        return bool(self.exporters or self.endpoint) and self.exporters != "none"

    @property
    def _is_otlp(self) -> bool:
        return self.exporters in ("", "otlp")

    def __str__(self) -> str:
        if not self._is_otlp:
            return f"the exporters of OTEL_TRACES_EXPORTER={self.exporters}"
        endpoint = _without_credentials(self.endpoint) or _DEFAULT_ENDPOINTS.get(self.protocol, "OTLP's default")
        return f"{endpoint} ({self.protocol})"

    def explain_success(self, console: Console, spans: int, service: str, traces: Traces, slow: Slow | None) -> None:
        """Say where the spans went, and what to search for."""
        what = f"All {spans:,} spans of {len(traces.requests):,} requests and {_kept(traces, slow)}"
        if self.given:
            say(console, f"{what} went to {self} as service {service!r}.")
        else:
            say(console, f"{what} came here over OTLP and went nowhere else. In Jaeger, {_JAEGER_PAGE}:")
            _command(console, _JAEGER)
            # As it was called, where it can't be called by its name: `make demo` has it in an environment of its own.
            program = "otel-npu" if shutil.which("otel-npu") else os.path.relpath(sys.argv[0])
            _command(console, f"{_JAEGER_ENDPOINT} {program} demo")
        say(
            console,
            f"Search there: service {service}, operation decode_step, Min Duration 100ms: the requests that the slow "
            "step served. Operation decode, tag npu.request.finish_reason=abort: one whose client went away.",
        )

    def explain_failure(self, console: Console, reason: str) -> None:
        """Say that the spans were not taken, and why, as far as the exporter knows."""
        say(console, f"The spans could not be sent to {self if self.given else 'this command'}.", "red")
        if reason:
            say(console, f"The exporter says: {reason}")
        if self.given and self._is_otlp:
            say(
                console,
                "Is a collector listening there? OTEL_EXPORTER_OTLP_ENDPOINT says where, "
                "OTEL_EXPORTER_OTLP_PROTOCOL whether by grpc (the default, often port 4317) "
                "or http/protobuf (often port 4318).",
            )


def _kept(traces: Traces, slow: Slow | None) -> str:
    """How many steps are traces of their own, and why they are, the slow one above all."""
    why = ""
    if slow is not None:
        number = slow.step.attributes[semconv.STEP_NUMBER]
        kept = {step.attributes[semconv.STEP_NUMBER]: step.attributes[semconv.SAMPLED_REASON] for step in traces.steps}
        reason = kept.get(number)
        if reason is None:
            why = f" (by rate; not the slow one, {number}: too few before it to judge by)"
        elif reason == semconv.SLOW:
            why = f" (number {number} because it was slow, the others by rate)"
        else:
            why = f" (by rate, the slow one, {number}, too)"
    return f"{len(traces.steps):,} steps{why}"


def name_service() -> str:
    """Give this process's spans a service name unless it has one; the name."""
    for entry in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "").split(","):
        key, _, value = entry.partition("=")
        if key.strip() == "service.name" and value.strip():
            return os.environ.get("OTEL_SERVICE_NAME", "").strip() or value.strip()
    if not os.environ.get("OTEL_SERVICE_NAME", "").strip():
        os.environ["OTEL_SERVICE_NAME"] = _SERVICE
    return os.environ["OTEL_SERVICE_NAME"].strip()


def _without_credentials(endpoint: str) -> str:
    parts = urlsplit(endpoint)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query=""))


def say(console: Console, text: str | Text, style: str = "") -> None:
    """Print a sentence: wrapped by words in a terminal, else, for a log or a search, as one line."""
    console.print(Text(text, style) if isinstance(text, str) else text, soft_wrap=not console.is_terminal)


def _command(console: Console, command: str) -> None:
    # Never wrapped by us: it is there to be copied.
    console.print(Text(f"  {command}", "bold"), soft_wrap=True)
