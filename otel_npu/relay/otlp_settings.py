"""Where and how spans and metrics leave over OTLP: the standard variables, checked before other code sees them.

OpenTelemetry's own exporters quote a malformed header, secret and all, in their log, and die of a bad number.
"""

from __future__ import annotations

import logging
import math
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote, urlsplit

from otel_npu.standard import bad_value

if TYPE_CHECKING:
    from collections.abc import Mapping

_log = logging.getLogger("otel_npu.relay")

GRPC: Final = "grpc"
HTTP: Final = "http/protobuf"
_GENERAL: Final = "OTEL_EXPORTER_OTLP_"
TRACES: Final = "TRACES"
METRICS: Final = "METRICS"
_DEFAULT_SECONDS: Final = 10.0
_EXPORT_TIMEOUT: Final = "OTEL_BSP_EXPORT_TIMEOUT"
_DEFAULT_LONGEST_SECONDS: Final = 30.0
# What both gRPC's metadata and HTTP's headers take.
_HEADER_NAME: Final = re.compile(r"[0-9a-z_.\-]+")
_HEADER_VALUE: Final = re.compile(r"[\x20-\x7e\t]*")


class ExportError(ValueError):
    """A standard variable that says where spans go holds what it does not take, or names what isn't installed."""


@dataclass(frozen=True)
class OtlpSettings:
    """How to reach a receiver.

    Attributes:
        protocol: `grpc` or `http/protobuf`.
        target: The URL for HTTP; for gRPC what its channels take, such as `collector:4317`.
        secure: Whether gRPC speaks TLS there.
        headers: Names, in lower case, and values.
        compression: `gzip`, `deflate` or `none`.
        timeout_seconds: How long one request may take.
        certificate: The file of the authorities that are trusted; empty for the system's.
        client_key: The file of the client's own key; empty for none.
        client_certificate: The file of the client's own certificate; empty for none.
        credential_provider: The name of an entry point that makes gRPC's credentials or a `requests.Session`.
        signal: `TRACES` or `METRICS`.
    """

    protocol: str
    target: str
    secure: bool
    headers: tuple[tuple[str, str], ...] = ()
    compression: str = "none"
    timeout_seconds: float = _DEFAULT_SECONDS
    certificate: str = ""
    client_key: str = ""
    client_certificate: str = ""
    credential_provider: str = ""
    signal: str = TRACES

    @property
    def shown(self) -> str:
        """The target without what may be a secret in it."""
        parts = urlsplit(self.target if "//" in self.target else f"//{self.target}")
        host = parts.netloc.rpartition("@")[2]
        return f"{parts.scheme}{'://' if parts.scheme else ''}{host}{parts.path}"

    @classmethod
    def from_environment(
        cls, protocol: str = "", environment: Mapping[str, str] = os.environ, signal: str = TRACES
    ) -> OtlpSettings:
        """What the environment says. A bad value that has a default is one line in the log, once for all signals.

        Args:
            protocol: The one that the exporter's name fixes; empty if the variables say it.
            environment: The variables.
            signal: Of what: its own variables come before those for all signals.

        Raises:
            ExportError: A variable without which nothing can be sent holds what it does not take.
        """
        read = _Reader(environment, signal)
        protocol = protocol or read("PROTOCOL", needed=True) or GRPC
        endpoint = read("ENDPOINT", needed=True)
        if protocol == GRPC:
            target, secure = _grpc_target(endpoint or "http://localhost:4317", read("INSECURE").lower())
        else:
            target, secure = _http_url(endpoint, read.given("ENDPOINT"), signal), True
        return cls(
            protocol,
            target,
            secure,
            headers=_headers(read.given("HEADERS"), read("HEADERS"), quiet=read.quiet("HEADERS")),
            compression=read("COMPRESSION").lower() or "none",
            timeout_seconds=min(
                float(read("TIMEOUT") or _DEFAULT_SECONDS),
                _longest_seconds(environment) if signal == TRACES else math.inf,
            ),
            certificate=read("CERTIFICATE", needed=secure),
            client_key=read("CLIENT_KEY", needed=secure),
            client_certificate=read("CLIENT_CERTIFICATE", needed=secure),
            credential_provider=_credential_provider(protocol, environment, signal),
            signal=signal,
        )


def _longest_seconds(environment: Mapping[str, str]) -> float:
    """After how long an export is left, whatever its own limit is: many mean milliseconds by that, and give 10000."""
    value = environment.get(_EXPORT_TIMEOUT, "").strip()
    bad = bad_value(_EXPORT_TIMEOUT, value) if value else None
    if bad is not None:
        _log.error("%s; it is not used", bad)
    return int(value) / 1000 if value and bad is None else _DEFAULT_LONGEST_SECONDS


class _Reader:
    """Reads a variable: the signal's own before the one for all signals; one that is blank is none."""

    def __init__(self, environment: Mapping[str, str], signal: str) -> None:
        self._environment = environment
        self._specific = f"{_GENERAL}{signal}_"
        self._first = signal == TRACES

    def given(self, name: str) -> str:
        """The variable that counts; empty if neither is set."""
        names = (prefix + name for prefix in (self._specific, _GENERAL))
        return next((name for name in names if self._environment.get(name, "").strip()), "")

    def quiet(self, name: str) -> bool:
        """Whether there is no need to complain: it is for all signals, and the first of them has done so."""
        return not self._first and not self.given(name).startswith(self._specific)

    def __call__(self, name: str, *, needed: bool = False) -> str:
        """What it holds; empty if neither is set, or if it holds what it does not take.

        Raises:
            ExportError: Without a good value nothing can be sent.
        """
        variable = self.given(name)
        value = self._environment.get(variable, "").strip()
        bad = bad_value(variable, value) if value else None
        if bad is None:
            return value
        if needed:
            raise ExportError(str(bad))
        if name == "HEADERS":
            return value  # its good ones are used
        if not self.quiet(name):
            _log.error("%s; it is not used", bad)
        return ""


def _grpc_target(endpoint: str, insecure: str) -> tuple[str, bool]:
    """What gRPC's channels take, and whether TLS is spoken, by the rules of the standard exporter."""
    parts = urlsplit(endpoint) if "://" in endpoint else None
    scheme = parts.scheme if parts is not None else ""
    secure = scheme == "https" or (insecure != "true" if insecure else scheme != "http")
    # gRPC has no use for a user's name in front of the host, and would quote it.
    return (parts.netloc.rpartition("@")[2] if parts is not None and parts.netloc else endpoint), secure


def _http_url(endpoint: str, variable: str, signal: str) -> str:
    """The URL of a signal: what its own variable holds is taken as it is.

    Raises:
        ExportError: It is not one for HTTP.
    """
    parts = urlsplit(endpoint or "http://localhost:4318")
    if parts.scheme not in ("http", "https"):
        raise ExportError(f"{variable}: takes a URL such as http://collector:4318 where the protocol is {HTTP}")
    if not variable.startswith(f"{_GENERAL}{signal}_"):
        parts = parts._replace(path=f"{parts.path.rstrip('/')}/v1/{signal.lower()}")
    return parts.geturl()


def _headers(variable: str, value: str, *, quiet: bool) -> tuple[tuple[str, str], ...]:
    """The headers of a list `name=value,...` with values percent-encoded; what can't be one is left out."""
    headers: dict[str, str] = {}
    left_out = 0
    for entry in filter(None, (entry.strip() for entry in value.split(","))):
        name, equals, given = (unquote(part).strip() for part in entry.partition("="))
        if equals and _HEADER_NAME.fullmatch(name.lower()) and _HEADER_VALUE.fullmatch(given):
            headers[name.lower()] = given
        else:
            left_out += 1
    if left_out and not quiet:
        bad = bad_value(variable, "=")
        _log.error("%s; %d of its entries left out", bad, left_out)
    return tuple(headers.items())


def _credential_provider(protocol: str, environment: Mapping[str, str], signal: str) -> str:
    kind = "GRPC" if protocol == GRPC else "HTTP"
    names = (f"OTEL_PYTHON_EXPORTER_OTLP_{kind}_{which}CREDENTIAL_PROVIDER" for which in (f"{signal}_", ""))
    return next((value for name in names if (value := environment.get(name, "").strip())), "")
