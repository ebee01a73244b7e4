"""OTLP over gRPC and HTTP, with all that a receiver answers: the standard exporters keep it to themselves.

They say only whether a batch was taken, not when to try again, nor how many of its spans were rejected.
"""

from __future__ import annotations

import gzip
import re
import time
import zlib
from abc import abstractmethod
from datetime import timezone
from email.utils import parsedate_to_datetime
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from otel_npu._version import __version__
from otel_npu.relay.encoding import encode_request
from otel_npu.relay.otlp_settings import GRPC, METRICS, TRACES, ExportError, OtlpSettings
from otel_npu.relay.outcomes import Later, Never, Outcome, Taken, TooLarge
from otel_npu.secrets import masked

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from opentelemetry.sdk.trace import ReadableSpan

_AGENT: Final = f"otel-npu/{__version__}"
_EXPORT: Final = {
    TRACES: "/opentelemetry.proto.collector.trace.v1.TraceService/Export",
    METRICS: "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export",
}
_LONGEST_MESSAGE: Final = 300
_MOST_ANSWER_BYTES: Final = 1 << 16
# gRPC keeps a broken connection for up to two minutes unless it is told otherwise.
_CHANNEL_OPTIONS: Final = (
    ("grpc.initial_reconnect_backoff_ms", 500),
    ("grpc.min_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 2000),
    ("grpc.max_send_message_length", -1),
    ("grpc.primary_user_agent", _AGENT),
)
_LATER_CODES: Final = frozenset(
    {"CANCELLED", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "ABORTED", "OUT_OF_RANGE", "UNAVAILABLE", "DATA_LOSS"}
)
_SIZE_CODES: Final = frozenset({"RESOURCE_EXHAUSTED", "OUT_OF_RANGE"})
_OF_SIZE: Final = re.compile(r"larger than|too large|message size|length.*limit", re.IGNORECASE)
_PREAMBLE: Final = re.compile(r"failed to connect to all addresses; last error: (UNKNOWN: )?")
_COMPRESS: Final[dict[str, Callable[[bytes], bytes]]] = {"gzip": gzip.compress, "deflate": zlib.compress}
_OK, _REDIRECTED, _BAD_REQUEST, _REQUEST_TIMEOUT, _TOO_LARGE = 200, 300, 400, 408, 413
_THROTTLED, _SERVER_ERROR, _NOT_IMPLEMENTED = 429, 500, 501


class OtlpExporter(SpanExporter):
    """Sends encoded requests to one receiver. Safe to use from several threads at once."""

    def __init__(self, settings: OtlpSettings) -> None:
        self.settings = settings

    @abstractmethod
    def send(self, body: bytes, timeout_seconds: float) -> Outcome:
        """Send an `ExportTraceServiceRequest`, once."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send these spans, once."""
        outcome = self.send(encode_request(spans), self.settings.timeout_seconds)
        taken = isinstance(outcome, Taken) and not outcome.rejected
        return SpanExportResult.SUCCESS if taken else SpanExportResult.FAILURE


def otlp_exporter(settings: OtlpSettings) -> OtlpExporter:
    """The exporter for these settings.

    Raises:
        ExportError: They name a provider of credentials that isn't there.
    """
    return GrpcExporter(settings) if settings.protocol == GRPC else HttpExporter(settings)


class GrpcExporter(OtlpExporter):
    """OTLP over gRPC."""

    def __init__(self, settings: OtlpSettings) -> None:
        super().__init__(settings)
        import grpc  # not before it is known to be wanted: it is large

        self._error = grpc.RpcError
        compression = {"gzip": grpc.Compression.Gzip, "deflate": grpc.Compression.Deflate}
        chosen = compression.get(settings.compression, grpc.Compression.NoCompression)
        if settings.secure:
            credentials = _provided(settings) or grpc.ssl_channel_credentials(
                *(Path(name).read_bytes() if name else None for name in _files(settings))
            )
            self._channel = grpc.secure_channel(settings.target, credentials, _CHANNEL_OPTIONS, chosen)
        else:
            self._channel = grpc.insecure_channel(settings.target, _CHANNEL_OPTIONS, chosen)
        self._call = self._channel.unary_unary(_EXPORT[settings.signal])

    def send(self, body: bytes, timeout_seconds: float) -> Outcome:
        """Send an `ExportTraceServiceRequest`, once."""
        try:
            answer = self._call(body, timeout=timeout_seconds, metadata=self.settings.headers)
        except self._error as error:
            return _grpc_outcome(error.code().name, error.details() or "", dict(error.trailing_metadata() or ()))
        return _taken(answer)

    def shutdown(self) -> None:
        """Let go of the connection."""
        self._channel.close()


class HttpExporter(OtlpExporter):
    """OTLP over HTTP, with protobuf."""

    def __init__(self, settings: OtlpSettings) -> None:
        super().__init__(settings)
        import requests

        self._error = requests.RequestException
        self._session = _provided(settings) or requests.Session()
        self._session.verify = settings.certificate or True
        if settings.client_certificate:
            certificate, key = settings.client_certificate, settings.client_key
            self._session.cert = (certificate, key) if key else certificate
        self._headers = {"content-type": "application/x-protobuf", "user-agent": _AGENT, **dict(settings.headers)}
        if settings.compression != "none":
            self._headers["content-encoding"] = settings.compression
        self._compress: Callable[[bytes], bytes] = _COMPRESS.get(settings.compression, bytes)

    def send(self, body: bytes, timeout_seconds: float) -> Outcome:
        """Send an `ExportTraceServiceRequest`, once."""
        # A redirect of a POST would become a GET, whose answer looks as if the spans had been taken.
        arguments: dict[str, Any] = {"timeout": timeout_seconds, "stream": True, "allow_redirects": False}
        try:
            with self._session.post(
                self.settings.target, self._compress(body), headers=self._headers, **arguments
            ) as answer:
                content = answer.raw.read(_MOST_ANSWER_BYTES, decode_content=True)
        except (self._error, OSError) as error:
            return Later(_in_words(error))
        if _OK <= answer.status_code < _REDIRECTED:
            protobuf = answer.headers.get("content-type", "").startswith("application/x-protobuf")
            return _taken(content if protobuf else b"")
        return _http_outcome(answer.status_code, answer.reason or "", content, answer.headers)

    def shutdown(self) -> None:
        """Let go of the connections."""
        self._session.close()


def _provided(settings: OtlpSettings) -> Any:
    """What the provider of credentials that is named makes; None if none is."""
    name = settings.credential_provider
    if not name:
        return None
    found = next(iter(entry_points(group="opentelemetry_otlp_credential_provider", name=name)), None)
    if found is None:
        raise ExportError(f"the credential provider {name!r} is not installed")
    return found.load()()


def _files(settings: OtlpSettings) -> tuple[str, str, str]:
    return settings.certificate, settings.client_key, settings.client_certificate


def _taken(answer: bytes) -> Taken:
    """What the receiver says of a request that it took: of spans and of points of metrics in the same bytes."""
    try:
        partial = ExportTraceServiceResponse.FromString(answer).partial_success
    except Exception:  # the spans are there, whatever else it says
        return Taken()
    return Taken(max(0, partial.rejected_spans), _message(partial.error_message))


def _grpc_outcome(code: str, details: str, trailer: dict[str, str | bytes]) -> Outcome:
    error = f"{code}: {_message(_PREAMBLE.sub('', details))}"
    if code in _SIZE_CODES and _OF_SIZE.search(details):
        return TooLarge(error)
    if code in _LATER_CODES:
        return Later(error, _retry_seconds(trailer))
    return Never(error)


def _retry_seconds(trailer: dict[str, str | bytes]) -> float | None:
    """What a `RetryInfo` says, alone or in the details of the status."""
    info = RetryInfo()
    try:
        alone, details = trailer.get("google.rpc.retryinfo-bin"), trailer.get("grpc-status-details-bin")
        if isinstance(alone, bytes):
            info.ParseFromString(alone)
        elif not isinstance(details, bytes) or not any(
            detail.Unpack(info) for detail in Status.FromString(details).details
        ):
            return None
    except Exception:  # what it says can't be read
        return None
    return float(info.retry_delay.seconds + info.retry_delay.nanos / 1e9)


def _http_outcome(status: int, reason: str, content: bytes, headers: Any) -> Outcome:
    error = f"{status} {reason}".strip()
    if _REDIRECTED <= status < _BAD_REQUEST:
        return Never(f"{error}: it sends on to {_message(headers.get('location', ''))}")
    message = _message(_status_message(content, headers.get("content-type", "")))
    error = f"{error}: {message}" if message else error
    if status == _TOO_LARGE:
        return TooLarge(error)
    if status in (_REQUEST_TIMEOUT, _THROTTLED) or (status >= _SERVER_ERROR and status != _NOT_IMPLEMENTED):
        return Later(error, _retry_after_seconds(headers.get("retry-after", "")))
    return Never(error)


def _status_message(content: bytes, kind: str) -> str:
    """What the body of an error says: a `Status`, as OTLP asks for, or a text."""
    if kind.startswith("application/x-protobuf"):
        try:
            return str(Status.FromString(content).message)
        except Exception:  # it is something else
            return ""
    return "" if "html" in kind else content.decode(errors="replace")


def _retry_after_seconds(value: str) -> float | None:
    """What a `Retry-After` says: seconds, or a date."""
    if value.strip().isdecimal():
        return float(value)
    try:
        at = parsedate_to_datetime(value)
    except ValueError:
        return None
    return max(0.0, (at if at.tzinfo else at.replace(tzinfo=timezone.utc)).timestamp() - time.time())


def _in_words(error: BaseException) -> str:
    """What is at the bottom of an error: those above quote the URL, with what may be secret in it."""
    seen: BaseException = error
    for _ in range(10):
        reason = next((arg for arg in getattr(seen, "args", ()) if isinstance(arg, BaseException)), None)
        below = reason or getattr(seen, "reason", None) or seen.__cause__ or seen.__context__
        if not isinstance(below, BaseException):
            break
        seen = below
    text = seen.strerror if isinstance(seen, OSError) and seen.strerror else str(seen)
    return _message(text) or type(seen).__name__


def _message(text: str) -> str:
    """One line of it, not too long, without secrets."""
    line = next((line.strip() for line in masked(text).splitlines() if line.strip()), "")
    return line if len(line) <= _LONGEST_MESSAGE else f"{line[:_LONGEST_MESSAGE]} ..."
