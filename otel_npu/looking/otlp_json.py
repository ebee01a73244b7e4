"""Spans as OTLP JSON, a request a line, as the collector's file exporter writes and reads it."""

from __future__ import annotations

import base64
import gzip
import json
from typing import TYPE_CHECKING, Any, Final

from otel_npu import semconv
from otel_npu._version import __version__
from otel_npu.looking.span import Span

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

_SPANS_A_LINE: Final = 512
_ERROR: Final = 2
_OK: Final = 1
_GZIP: Final = b"\x1f\x8b"
_KINDS: Final = ("SPAN_KIND_UNSPECIFIED", "SPAN_KIND_INTERNAL")


class ReadError(Exception):
    """A file holds no spans; the message says which, and why."""


def lines(spans: Sequence[Span]) -> Iterator[str]:
    """The lines of a file with these spans."""
    for first in range(0, len(spans), _SPANS_A_LINE):
        by_resource: dict[int, list[Span]] = {}
        for span in spans[first : first + _SPANS_A_LINE]:
            by_resource.setdefault(id(span.resource), []).append(span)
        resources = [
            {
                "resource": {"attributes": _attributes(group[0].resource)},
                "scopeSpans": [
                    {
                        "scope": {"name": semconv.SCOPE, "version": __version__},
                        "spans": [_span(span) for span in group],
                        "schemaUrl": semconv.SCHEMA_URL,
                    }
                ],
            }
            for group in by_resource.values()
        ]
        yield json.dumps({"resourceSpans": resources}, separators=(",", ":")) + "\n"


def read(path: Path) -> list[Span]:
    """The spans of a file; what else is in it, such as metrics, is passed over.

    Raises:
        ReadError: There is no such file, or there is no OTLP JSON in it.
    """
    try:
        content = path.read_bytes()
        text = (gzip.decompress(content) if content.startswith(_GZIP) else content).decode()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ReadError(f"{path} can't be read: {getattr(error, 'strerror', None) or error}") from error
    return from_text(text, str(path))


def from_text(text: str, name: str) -> list[Span]:
    """The spans of such a text, of this name.

    Raises:
        ReadError: A line of it is no OTLP JSON.
    """
    spans: list[Span] = []
    for number, document in _documents(text, name):
        try:
            spans += _spans(document)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ReadError(f"{name}, line {number}: no OTLP JSON: {type(error).__name__} {error}") from error
    if not spans:
        raise ReadError(f"{name} holds no spans")
    return spans


def _documents(text: str, name: str) -> Iterator[tuple[int, Any]]:
    number = 1
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)
        except ValueError:
            break
        yield number, document
    else:
        return
    try:  # one document, written for people
        if number == 1:
            yield 1, json.loads(text)
            return
    except ValueError:
        pass
    raise ReadError(f"{name}, line {number}: no OTLP JSON")


def _spans(document: Any) -> Iterator[Span]:
    for of_resource in document.get("resourceSpans", ()):
        resource = _plain(of_resource.get("resource", {}).get("attributes", ()))
        for of_scope in of_resource.get("scopeSpans", ()):
            for span in of_scope.get("spans", ()):
                status = span.get("status", {})
                code = status.get("code", 0)
                failed = code in (_ERROR, "STATUS_CODE_ERROR")
                yield Span(
                    span["name"],
                    span["traceId"],
                    span["spanId"],
                    span.get("parentSpanId", ""),
                    int(span["startTimeUnixNano"]),
                    int(span["endTimeUnixNano"]),
                    _plain(span.get("attributes", ())),
                    resource,
                    (status.get("message") or "error") if failed else "" if code in (_OK, "STATUS_CODE_OK") else None,
                    [(link["traceId"], link["spanId"]) for link in span.get("links", ())],
                    [(int(event["timeUnixNano"]), event["name"]) for event in span.get("events", ())],
                )


def _span(span: Span) -> dict[str, Any]:
    made: dict[str, Any] = {
        "traceId": span.trace_id,
        "spanId": span.span_id,
        "parentSpanId": span.parent_id,
        "name": span.name,
        "kind": _KINDS.index("SPAN_KIND_INTERNAL"),
        "startTimeUnixNano": str(span.start_ns),
        "endTimeUnixNano": str(span.end_ns),
        "attributes": _attributes(span.attributes),
        "status": {},
    }
    if span.links:
        made["links"] = [{"traceId": trace_id, "spanId": span_id} for trace_id, span_id in span.links]
    if span.events:
        made["events"] = [{"timeUnixNano": str(at_ns), "name": name} for at_ns, name in span.events]
    if span.error is not None:
        made["status"] = {"code": _ERROR, "message": span.error} if span.error else {"code": _OK}
    return made


def _attributes(attributes: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"key": key, "value": _value(value)} for key, value in attributes.items()]


def _value(value: Any) -> dict[str, Any]:
    if isinstance(value, bool):
        return {"boolValue": value}
    if isinstance(value, int):
        return {"intValue": str(value)}
    if isinstance(value, float):
        return {"doubleValue": value}
    if isinstance(value, str):
        return {"stringValue": value}
    return {"arrayValue": {"values": [_value(each) for each in value]}}


def _plain(attributes: Iterable[Any]) -> dict[str, Any]:
    return {attribute["key"]: _plain_value(attribute.get("value", {})) for attribute in attributes}


def _plain_value(value: Mapping[str, Any]) -> Any:
    if "intValue" in value:
        return int(value["intValue"])
    if "arrayValue" in value:
        return [_plain_value(each) for each in value["arrayValue"].get("values", ())]
    if "kvlistValue" in value:
        return _plain(value["kvlistValue"].get("values", ()))
    return next(iter(value.values()), None)


def from_protobuf(request: bytes) -> list[Span]:
    """The spans of an OTLP `ExportTraceServiceRequest`."""
    from google.protobuf.json_format import MessageToDict
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    document = MessageToDict(ExportTraceServiceRequest.FromString(request))
    spans = list(_spans(document))
    for span in spans:  # bytes are base64 there
        span.trace_id, span.span_id, span.parent_id = map(_hex, (span.trace_id, span.span_id, span.parent_id))
        span.links = [(_hex(trace_id), _hex(span_id)) for trace_id, span_id in span.links]
    return spans


def _hex(text: str) -> str:
    return base64.b64decode(text).hex()
