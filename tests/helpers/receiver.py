"""An OTLP receiver on loopback, over gRPC and HTTP: it keeps all spans and metrics, and can be made to misbehave."""

from __future__ import annotations

import gzip
import http.server
import threading
import time
import zlib
from concurrent import futures
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Callable

    from opentelemetry.proto.common.v1 import common_pb2


@dataclass(frozen=True)
class Span:
    """One span as it arrived; ids in hex, times in nanoseconds since the epoch."""

    name: str
    trace_id: str
    span_id: str
    parent_span_id: str
    start_ns: int
    end_ns: int
    attributes: dict[str, Any]
    resource: dict[str, Any]
    scope: str
    links: list[tuple[str, str]]
    events: list[tuple[str, int]]
    status: int
    status_message: str
    kind: int

    @property
    def duration_ns(self) -> int:
        return self.end_ns - self.start_ns


@dataclass(frozen=True)
class Answer:
    """What a receiver says instead of taking everything: the same over gRPC and HTTP, each in its own way.

    Attributes:
        code: The status over gRPC; `OK` to take what is not rejected.
        status: The status over HTTP.
        details: What it says about it.
        after_seconds: When to come again.
        rejected: How many spans it rejects.
    """

    code: str = "OK"
    status: int = 200
    details: str = ""
    after_seconds: float | None = None
    rejected: int = 0


REFUSED = Answer("PERMISSION_DENIED", 403, "refused")
AWAY = Answer("UNAVAILABLE", 503, "no room")


@dataclass(frozen=True)
class Point:
    """One point of a metric as it arrived; `value` is a number's, or the sum of a histogram."""

    metric: str
    unit: str
    kind: str
    temporality: int
    attributes: dict[str, Any]
    resource: dict[str, Any]
    value: float
    count: int
    buckets: list[int]
    exemplars: list[tuple[str, str, float]]
    start_ns: int
    end_ns: int


@dataclass
class Receiver:
    """Receives on two ports. Set `answer` to what it says, `refuse` to refuse all, `delay_seconds` to answer late."""

    answer: Answer | Callable[[trace_service_pb2.ExportTraceServiceRequest], Answer] = Answer()
    refuse: bool = False
    delay_seconds: float = 0.0
    exports: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    grpc_port: int = 0
    http_port: int = 0
    _closing: threading.Event = field(default_factory=threading.Event)
    _spans: list[Span] = field(default_factory=list)
    _points: list[Point] = field(default_factory=list)
    _arrived: threading.Condition = field(default_factory=threading.Condition)

    def __enter__(self) -> Receiver:
        self._grpc = grpc.server(futures.ThreadPoolExecutor(8))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(_Servicer(self), self._grpc)  # type: ignore[no-untyped-call]
        metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server(_MetricsServicer(self), self._grpc)  # type: ignore[no-untyped-call]
        self.grpc_port = self._grpc.add_insecure_port("127.0.0.1:0")
        self._grpc.start()
        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.http_port = self._http.server_address[1]
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._grpc.stop(grace=None).wait()
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()

    @property
    def grpc_environment(self) -> dict[str, str]:
        """What sends spans here over gRPC."""
        return {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{self.grpc_port}",
            "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc",
        }

    @property
    def http_environment(self) -> dict[str, str]:
        """What sends spans here over HTTP."""
        return {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{self.http_port}",
            "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
        }

    @property
    def spans(self) -> list[Span]:
        """All spans so far, in order of arrival."""
        with self._arrived:
            return list(self._spans)

    def named(self, name: str) -> list[Span]:
        """The spans of this name so far."""
        return [span for span in self.spans if span.name == name]

    def wait_for(self, count: int, name: str | None = None, timeout_seconds: float = 120.0) -> list[Span]:
        """The spans (of this name), once there are at least so many.

        Raises:
            AssertionError: They did not arrive in time.
        """
        deadline = time.monotonic() + timeout_seconds
        with self._arrived:
            while True:
                spans = [span for span in self._spans if name is None or span.name == name]
                if len(spans) >= count:
                    return spans
                left = deadline - time.monotonic()
                assert left > 0, f"{len(spans)} of {count} spans arrived: {sorted({s.name for s in self._spans})}"
                self._arrived.wait(left)

    def points(self, metric: str) -> list[Point]:
        """All points of this metric so far, in order of arrival."""
        with self._arrived:
            return [point for point in self._points if point.metric == metric]

    def wait_for_point(
        self, metric: str, wanted: Callable[[Point], bool] = lambda _: True, timeout_seconds: float = 60
    ) -> Point:
        """The first point of this metric that is as wanted, once it is there.

        Raises:
            AssertionError: It did not arrive in time.
        """
        deadline = time.monotonic() + timeout_seconds
        with self._arrived:
            while True:
                found = next((point for point in self._points if point.metric == metric and wanted(point)), None)
                if found is not None:
                    return found
                left = deadline - time.monotonic()
                assert left > 0, f"no such point of {metric}: {[p for p in self._points if p.metric == metric][-3:]}"
                self._arrived.wait(left)

    def take_metrics(self, request: metrics_service_pb2.ExportMetricsServiceRequest) -> None:
        """Keep the request's points."""
        with self._arrived:
            for resource_metrics in request.resource_metrics:
                resource = _attributes(resource_metrics.resource.attributes)
                for scope_metrics in resource_metrics.scope_metrics:
                    for metric in scope_metrics.metrics:
                        self._points += _points(metric, resource)
            self._arrived.notify_all()

    def take(self, request: trace_service_pb2.ExportTraceServiceRequest, headers: dict[str, str]) -> Answer:
        """Keep the request's spans, unless it says something else."""
        self._closing.wait(self.delay_seconds)
        with self._arrived:
            self.exports += 1
            self.headers = headers
            answer = (
                REFUSED if self.refuse else self.answer if isinstance(self.answer, Answer) else self.answer(request)
            )
            if answer.code != "OK":
                return answer
            for resource_spans in request.resource_spans:
                resource = _attributes(resource_spans.resource.attributes)
                for scope_spans in resource_spans.scope_spans:
                    self._spans += [_span(span, resource, scope_spans.scope.name) for span in scope_spans.spans]
            self._arrived.notify_all()
        return answer


class _Servicer(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self, receiver: Receiver) -> None:
        self._receiver = receiver

    def Export(self, request: Any, context: Any) -> Any:  # noqa: N802
        answer = self._receiver.take(request, dict(context.invocation_metadata()))
        if answer.code != "OK":
            if answer.after_seconds is not None:
                detail = any_pb2.Any()
                detail.Pack(RetryInfo(retry_delay=_duration(answer.after_seconds)))
                status = Status(code=8, message=answer.details, details=[detail])
                context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
            context.abort(grpc.StatusCode[answer.code], answer.details)
        return _response(answer)


class _MetricsServicer(metrics_service_pb2_grpc.MetricsServiceServicer):
    def __init__(self, receiver: Receiver) -> None:
        self._receiver = receiver

    def Export(self, request: Any, context: Any) -> Any:  # noqa: N802
        self._receiver.take_metrics(request)
        return metrics_service_pb2.ExportMetricsServiceResponse()


def _handler(receiver: Receiver) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            if self.headers.get("Content-Encoding") == "deflate":
                body = zlib.decompress(body)
            if self.path.endswith("/v1/metrics"):
                receiver.take_metrics(metrics_service_pb2.ExportMetricsServiceRequest.FromString(body))
                self.send_response(200)
                self.end_headers()
                return
            request = trace_service_pb2.ExportTraceServiceRequest.FromString(body)
            answer = receiver.take(request, {name.lower(): value for name, value in self.headers.items()})
            content = _response(answer) if answer.code == "OK" else Status(message=answer.details)
            self.send_response(answer.status)
            self.send_header("Content-Type", "application/x-protobuf")
            if answer.after_seconds is not None:
                self.send_header("Retry-After", f"{answer.after_seconds:.0f}")
            self.end_headers()
            self.wfile.write(content.SerializeToString())

        def log_message(self, *_: object) -> None:
            pass

    return Handler


def _response(answer: Answer) -> Any:
    response = trace_service_pb2.ExportTraceServiceResponse()
    if answer.rejected:
        response.partial_success.rejected_spans = answer.rejected
        response.partial_success.error_message = answer.details
    return response


def _duration(seconds: float) -> duration_pb2.Duration:
    return duration_pb2.Duration(seconds=int(seconds), nanos=round(seconds % 1 * 1e9))


def _span(span: Any, resource: dict[str, Any], scope: str) -> Span:
    return Span(
        name=span.name,
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_span_id=span.parent_span_id.hex(),
        start_ns=span.start_time_unix_nano,
        end_ns=span.end_time_unix_nano,
        attributes=_attributes(span.attributes),
        resource=resource,
        scope=scope,
        links=[(link.trace_id.hex(), link.span_id.hex()) for link in span.links],
        events=[(event.name, event.time_unix_nano) for event in span.events],
        status=span.status.code,
        status_message=span.status.message,
        kind=span.kind,
    )


def _points(metric: Any, resource: dict[str, Any]) -> list[Point]:
    kind = metric.WhichOneof("data")
    data = getattr(metric, kind)
    return [
        Point(
            metric=metric.name,
            unit=metric.unit,
            kind=kind,
            temporality=getattr(data, "aggregation_temporality", 0),
            attributes=_attributes(point.attributes),
            resource=resource,
            value=point.sum if hasattr(point, "sum") else getattr(point, point.WhichOneof("value")),
            count=getattr(point, "count", 0),
            buckets=list(
                getattr(point, "bucket_counts", None) or getattr(getattr(point, "positive", None), "bucket_counts", [])
            ),
            exemplars=[(each.trace_id.hex(), each.span_id.hex(), each.as_double) for each in point.exemplars],
            start_ns=point.start_time_unix_nano,
            end_ns=point.time_unix_nano,
        )
        for point in data.data_points
    ]


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: common_pb2.AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(item) for item in value.array_value.values]
    return None if kind is None else getattr(value, kind)
