"""Receives OTLP over HTTP on loopback and keeps the spans: what the demo draws has been through the wire."""

from __future__ import annotations

import http.server
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

if TYPE_CHECKING:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.proto.common.v1.common_pb2 import AnyValue

_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Span:
    """One span as it arrived; times in nanoseconds since the epoch, attributes of other types left out."""

    name: str
    trace_id: bytes
    span_id: bytes
    parent_id: bytes
    start_ns: int
    end_ns: int
    attributes: dict[str, str | int | float | bool]

    @property
    def ms(self) -> float:
        """How long it took."""
        return (self.end_ns - self.start_ns) * 1e-6


class Receiver:
    """A context manager that receives while it is open."""

    def __init__(self) -> None:
        self._spans: list[Span] = []
        self._lock = threading.Lock()
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(_POLL_SECONDS,), daemon=True)

    @property
    def url(self) -> str:
        """Where spans are received."""
        return f"http://127.0.0.1:{self._server.server_port}/v1/traces"

    @property
    def spans(self) -> list[Span]:
        """What has arrived so far."""
        with self._lock:
            return list(self._spans)

    def __enter__(self) -> Receiver:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def take(self, body: bytes) -> None:
        """Keep the spans of one export request."""
        request = ExportTraceServiceRequest.FromString(body)
        spans = [
            Span(
                name=span.name,
                trace_id=span.trace_id,
                span_id=span.span_id,
                parent_id=span.parent_span_id,
                start_ns=span.start_time_unix_nano,
                end_ns=span.end_time_unix_nano,
                attributes={pair.key: value for pair in span.attributes if (value := _plain(pair.value)) is not None},
            )
            for of_resource in request.resource_spans
            for of_scope in of_resource.scope_spans
            for span in of_scope.spans
        ]
        with self._lock:
            self._spans += spans


def exporter_to(url: str) -> OTLPSpanExporter:
    """An exporter to a receiver on this loopback, which no proxy reaches."""
    import requests
    from opentelemetry.exporter.otlp.proto.http import Compression
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    session = requests.Session()
    session.trust_env = False
    return OTLPSpanExporter(url, compression=Compression.NoCompression, session=session)


def _plain(value: AnyValue) -> str | int | float | bool | None:
    kind = value.WhichOneof("value")
    if kind not in ("string_value", "int_value", "double_value", "bool_value"):
        return None
    plain: str | float | bool = getattr(value, kind)
    return plain


def _handler(receiver: Receiver) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            receiver.take(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.send_header("Content-Type", "application/x-protobuf")
            self.end_headers()
            self.wfile.write(ExportTraceServiceResponse().SerializeToString())

        def log_message(self, *_: object) -> None:
            """Nothing: the terminal is for the picture."""

    return Handler
