"""The check of where spans go: one test span through the exporter that the relay would make.

Runs in a process of its own: it may hang, and it shortens the exporter's time limit in its environment.
"""

from __future__ import annotations

import importlib.util
import os
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from otel_npu import semconv
from otel_npu._version import __version__
from otel_npu.cli.doctor import diagnosis, running
from otel_npu.cli.doctor.findings import Finding, failed, first_line, not_applicable, ok, warning
from otel_npu.cli.doctor.target import GENERAL, SPECIFIC, Target, given_by
from otel_npu.secrets import masked

if TYPE_CHECKING:
    from collections.abc import Iterator

    from opentelemetry.sdk.trace import ReadableSpan

    from otel_npu.relay.otlp import OtlpExporter

ENDPOINT: Final = "endpoint"

_OTLP: Final = {"otlp": "", "otlp_proto_grpc": "grpc", "otlp_proto_http": "http/protobuf"}
_EXPORT_SECONDS: Final = 4


def checks() -> Iterator[Finding]:
    """Send one span with each exporter that the environment names.

    Where it names no endpoint and a relay runs, the relay's are tried: a server may have been told elsewhere.
    """
    relay = next(running.relays(), None) if not given_by("ENDPOINT") else None
    if relay is not None:
        names = ("OTEL_EXPORTER_OTLP_", "OTEL_TRACES_EXPORTER")
        os.environ.update({name: value for name, value in relay.environment.items() if name.startswith(names)})
    for finding in _of_exporters():
        whose = "" if relay is None else f", as process {relay.pid} does"
        yield replace(finding, found=masked(finding.found + whose), cure=masked(finding.cure))


def _of_exporters() -> Iterator[Finding]:
    names = os.environ.get("OTEL_TRACES_EXPORTER", "").strip() or "otlp"
    for name in filter(None, (name.strip() for name in names.split(","))):
        if name == "none":
            yield not_applicable(ENDPOINT, "OTEL_TRACES_EXPORTER=none: no spans are exported")
        elif name in _OTLP:
            yield _check(name)
        else:
            yield not_applicable(ENDPOINT, f"OTEL_TRACES_EXPORTER={name}: not tried, for it may leave something behind")


def _check(name: str) -> Finding:
    from otel_npu.relay.otlp import otlp_exporter
    from otel_npu.relay.otlp_settings import OtlpSettings

    for prefix in (SPECIFIC, GENERAL):
        os.environ[f"{prefix}TIMEOUT"] = str(_EXPORT_SECONDS)
    target = Target.from_environment(_OTLP[name])
    try:
        exporter = otlp_exporter(OtlpSettings.from_environment(_OTLP[name]))
    except Exception as error:
        return failed(ENDPOINT, f"the exporter can't be made: {first_line(error)}", "correct this variable")
    began = time.monotonic()
    complaint = _send(exporter)
    if complaint is None:
        return ok(ENDPOINT, f"{target} took a test span within {(time.monotonic() - began) * 1000:.0f} ms")
    trouble = diagnosis.explain(target, complaint)
    found = f"{target}: {trouble.found}"
    if not target.given and importlib.util.find_spec("vllm") is not None:
        # vLLM may be told by its command line, which can't be seen from here.
        cure = f"where vLLM gets --otlp-traces-endpoint, set {SPECIFIC}ENDPOINT to the same; else {trouble.cure}"
        return warning(ENDPOINT, found, cure)
    return failed(ENDPOINT, found, trouble.cure)


def _send(exporter: OtlpExporter) -> str | None:
    """Export one span; None, or what went wrong."""
    from otel_npu.relay.encoding import encode_request
    from otel_npu.relay.outcomes import Taken

    outcome = exporter.send(encode_request([_span()]), exporter.settings.timeout_seconds)
    if isinstance(outcome, Taken):
        return outcome.message or "the span was rejected" if outcome.rejected else None
    return outcome.error


def _span() -> ReadableSpan:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope
    from opentelemetry.trace import SpanContext, TraceFlags

    trace_id, span_id = (int.from_bytes(os.urandom(length), "big") | 1 for length in (16, 8))
    now = time.time_ns()
    return ReadableSpan(
        semconv.DOCTOR_TEST,
        SpanContext(trace_id, span_id, is_remote=False, trace_flags=TraceFlags(TraceFlags.SAMPLED)),
        resource=Resource.create(),
        instrumentation_scope=InstrumentationScope(semconv.SCOPE, __version__, semconv.SCHEMA_URL),
        start_time=now,
        end_time=now,
    )
