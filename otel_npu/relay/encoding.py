"""Spans as OTLP has them on the wire: protobuf, written by hand, at a tenth of what building its messages costs.

Tags are those of `opentelemetry/proto/trace/v1/trace.proto`; the tests hold every byte against the SDK's encoder.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from opentelemetry.trace import SpanKind

from otel_npu.relay.links import Links
from otel_npu.relay.own_span import OwnSpan

if TYPE_CHECKING:
    from collections.abc import Iterable

    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import Event, ReadableSpan
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope
    from opentelemetry.trace import Link, Status

_TIMES: Final = struct.Struct("<BQBQ").pack
_FIXED64: Final = struct.Struct("<BQ").pack
_DOUBLE: Final = struct.Struct("<d").pack
_KINDS: Final = {kind: bytes((0x30, kind.value + 1)) for kind in SpanKind}
# Whether the other span is in another process: known to be, or known not to be.
_PARENT_FLAGS: Final = {remote: b"\x85\x01" + struct.pack("<I", 0x300 if remote else 0x100) for remote in (False, True)}
_LINK_FLAGS: Final = {remote: b"\x35" + struct.pack("<I", 0x300 if remote else 0x100) for remote in (False, True)}
_NOT_REMOTE: Final = _PARENT_FLAGS[False]
_RAW_LINK_END: Final = _LINK_FLAGS[True]


class SharedAttributes(dict[str, Any]):
    """Attributes of spans that differ in nothing but their ids and parents: all else of them is encoded once.

    They don't change. Spans in which there is more than that, as links, may have them too.
    """

    __slots__ = ("_encoded",)

    def __init__(self, attributes: Mapping[str, Any]) -> None:
        super().__init__(attributes)
        self._encoded: tuple[Any, bytes] = None, b""

    def encode(self, span: ReadableSpan) -> bytes:
        """All of a span that has these attributes, but for its ids and flags."""
        if span._events or span._links:
            return _encode_all_but_ids(span)
        what = span._name, span._start_time, span._end_time
        if self._encoded[0] != what:
            self._encoded = what, _encode_all_but_ids(span)
        return self._encoded[1]


def encode_span(span: ReadableSpan) -> bytes:
    """The span, as a field of `ScopeSpans`.

    Raises:
        Exception: Something in it is not what OTLP takes: a time below 0 or above 2^64, say.
    """
    attributes = span._attributes
    if type(span) is OwnSpan:
        rest = attributes.encode(span) if type(attributes) is SharedAttributes else _encode_all_but_ids(span)
        ids, parent_id = (span.trace_id, span.span_id), span.parent_id
        if parent_id:
            return _field(0x12, b"\x0a\x10%b\x12\x08%b\x22\x08%b%b%b" % (*ids, parent_id, rest, _NOT_REMOTE))
        return _field(0x12, b"\x0a\x10%b\x12\x08%b%b%b" % (*ids, rest, _NOT_REMOTE))
    context, parent = span.context, span.parent
    assert context is not None
    parts = [b"\x0a\x10", context.trace_id.to_bytes(16, "big"), b"\x12\x08", context.span_id.to_bytes(8, "big")]
    if context.trace_state:
        parts.append(_text(0x1A, context.trace_state.to_header()))
    if parent is not None:
        parts += (b"\x22\x08", parent.span_id.to_bytes(8, "big"))
    parts.append(attributes.encode(span) if isinstance(attributes, SharedAttributes) else _encode_all_but_ids(span))
    parts.append(_PARENT_FLAGS[parent is not None and parent.is_remote])
    return _field(0x12, b"".join(parts))


def _encode_all_but_ids(span: ReadableSpan) -> bytes:
    # The properties copy: what they copy from has had these names since the first release of the SDK.
    attributes, events, links = span._attributes, span._events, span._links
    parts = [_beginning(span._name, span._kind), _TIMES(0x39, span._start_time or 0, 0x41, span._end_time or 0)]
    if attributes:
        _add_attributes(parts, attributes)
    if events:
        parts += [_field(0x5A, _event(event)) for event in events]
    if links:
        parts += _raw_links(links) if isinstance(links, Links) else [_field(0x6A, _link(link)) for link in links]
    if getattr(attributes, "dropped", 0) or getattr(events, "dropped", 0) or getattr(links, "dropped", 0):
        parts.append(_counts(span))
    parts.append(_status(span._status))
    return b"".join(parts)


class Request:
    """An `ExportTraceServiceRequest`: encoded spans, gathered by their resource and scope."""

    def __init__(self) -> None:
        self.size = 0
        """How many bytes its spans have."""
        # By identity: a resource's own hash is dear, and one process's spans share one.
        self._parts: dict[tuple[int, int], tuple[ReadableSpan, list[bytes]]] = {}

    def add(self, spans: Sequence[ReadableSpan], encoded: Sequence[bytes]) -> None:
        """Take in spans."""
        resource: Any = None
        scope: Any = None
        part: list[bytes] = []
        for span, content in zip(spans, encoded, strict=True):
            if span._resource is not resource or span._instrumentation_scope is not scope or not part:
                resource, scope = span._resource, span._instrumentation_scope
                part = self._parts.setdefault((id(resource), id(scope)), (span, []))[1]
            part.append(content)
        self.size += sum(map(len, encoded))

    def clear(self) -> None:
        """Let go of the spans."""
        self._parts = {}

    def encode(self) -> bytes:
        """The whole of it."""
        return b"".join(
            _resource_spans(span.resource, span.instrumentation_scope, encoded)
            for span, encoded in self._parts.values()
        )


def encode_request(spans: Iterable[ReadableSpan]) -> bytes:
    """An `ExportTraceServiceRequest` of these spans.

    Raises:
        Exception: As for each of them.
    """
    request, taken = Request(), [*spans]
    request.add(taken, [encode_span(span) for span in taken])
    return request.encode()


# Below this line: parts of them. Each function gives a whole field, or the content of one.


def _resource_spans(resource: Resource, scope: InstrumentationScope | None, spans: Iterable[bytes]) -> bytes:
    attributes = b"".join(_attribute(0x0A, key, value) for key, value in resource.attributes.items())
    parts = []
    if scope is not None:
        parts.append(_text(0x0A, scope.name))
        if scope.version:
            parts.append(_text(0x12, scope.version))
        parts += [_attribute(0x1A, key, value) for key, value in (scope.attributes or {}).items()]
    parts = [_field(0x0A, b"".join(parts)), *spans]
    if scope is not None and scope.schema_url:
        parts.append(_text(0x1A, scope.schema_url))
    whole = [_field(0x0A, attributes), _field(0x12, b"".join(parts))]
    if resource.schema_url:
        whole.append(_text(0x1A, resource.schema_url))
    return _field(0x0A, b"".join(whole))


def _event(event: Event) -> bytes:
    parts = [_FIXED64(0x09, event.timestamp), _text(0x12, event.name)]
    parts += [_attribute(0x1A, key, value) for key, value in (event.attributes or {}).items()]
    if event.dropped_attributes:
        parts.append(b"\x20" + _varint(event.dropped_attributes))
    return b"".join(parts)


def _raw_links(links: Links) -> list[bytes]:
    head, end = b"\x6a\x21\x0a\x10", _RAW_LINK_END
    return [b"%b%b\x12\x08%b%b" % (head, raw[:16], raw[16:24], end) for raw in links.raw]


def _link(link: Link) -> bytes:
    context = link.context
    parts = [b"\x0a\x10", context.trace_id.to_bytes(16, "big"), b"\x12\x08", context.span_id.to_bytes(8, "big")]
    parts += [_attribute(0x22, key, value) for key, value in (link.attributes or {}).items()]
    if link.dropped_attributes:
        parts.append(b"\x28" + _varint(link.dropped_attributes))
    parts.append(_LINK_FLAGS[context.is_remote])
    return b"".join(parts)


def _counts(span: ReadableSpan) -> bytes:
    """How many attributes, events and links were beyond the limits."""
    counts = ((b"\x50", span.dropped_attributes), (b"\x60", span.dropped_events), (b"\x70", span.dropped_links))
    return b"".join(tag + _varint(count) for tag, count in counts if count)


def _status(status: Status | None) -> bytes:
    if status is None:
        return b""
    code = status.status_code.value
    if not code and not status.description:
        return b"\x7a\x00"
    message = _text(0x12, status.description) if status.description else b""
    return _field(0x7A, message + (bytes((0x18, code)) if code else b""))


# Attributes. The same keys, words and small numbers come again and again: what they become is remembered.

_MAX_REMEMBERED: Final = 4096
_LONGEST_REMEMBERED: Final = 64
_LARGEST_REMEMBERED: Final = 1024
_before_floats: Final[dict[str, bytes]] = {}
_whole_pairs: Final[dict[tuple[str, type, Any], bytes]] = {}
_beginnings: Final[dict[tuple[str, SpanKind], bytes]] = {}


def _beginning(name: str, kind: SpanKind) -> bytes:
    """A span's name and kind."""
    known = _beginnings.get((name, kind))
    return known or _remember(_beginnings, (name, kind), _text(0x2A, name) + _KINDS[kind])


def _add_attributes(parts: list[bytes], attributes: Mapping[str, Any]) -> None:
    """A span's attributes: those of which there are many, without a call for each."""
    floats, pairs = _before_floats, _whole_pairs
    for key, value in attributes.items():
        kind = type(value)
        if kind is float:
            before = floats.get(key)
            if before is None:
                before = _remember(floats, key, _pair(0x4A, key, _any_value(0.0))[:-8])
            parts += (before, _DOUBLE(value))
        elif kind is str or kind is int:
            known = pairs.get((key, kind, value))
            if known is None:
                known = _pair(0x4A, key, _any_value(value))
                if len(value) <= _LONGEST_REMEMBERED if kind is str else 0 <= value <= _LARGEST_REMEMBERED:
                    _remember(pairs, (key, kind, value), known)
            parts.append(known)
        else:
            parts.append(_pair(0x4A, key, _any_value(value)))


def _attribute(tag: int, key: str, value: Any) -> bytes:
    return _pair(tag, key, _any_value(value))


def _pair(tag: int, key: str, value: bytes) -> bytes:
    return _field(tag, _text(0x0A, key) + _field(0x12, value))


def _remember(memory: dict[Any, bytes], key: Any, value: bytes) -> bytes:
    if len(memory) >= _MAX_REMEMBERED:
        memory.clear()
    memory[key] = value
    return value


def _any_value(value: Any) -> bytes:
    for kind, encode in _VALUES:
        if isinstance(value, kind):
            return encode(value)
    raise TypeError(f"OTLP has no {type(value).__name__}")


def _integer(value: int) -> bytes:
    # What has passed the end of its range stays there: a count does, if anything.
    return b"\x18" + _varint(min(max(value, -(1 << 63)), (1 << 63) - 1) & ((1 << 64) - 1))


_VALUES: Final[tuple[tuple[type, Callable[[Any], bytes]], ...]] = (
    (str, lambda value: _text(0x0A, value)),
    (bool, lambda value: b"\x10\x01" if value else b"\x10\x00"),  # before the integers, of which it is one
    (int, _integer),
    (float, lambda value: b"\x21" + _DOUBLE(value)),
    (bytes, lambda value: _field(0x3A, value)),
    (Sequence, lambda value: _field(0x2A, b"".join(_field(0x0A, _any_value(item)) for item in value))),
    (Mapping, lambda value: _field(0x32, b"".join(_pair(0x0A, str(key), _any_value(it)) for key, it in value.items()))),
    (type(None), lambda value: b""),  # noqa: ARG005  one signature for all
)


# Protobuf.

_SEVEN_BITS: Final = 0x7F
_FOURTEEN_BITS: Final = 0x3FFF
_ONE_BYTE: Final = tuple(bytes((number,)) for number in range(_SEVEN_BITS + 1))


def _varint(number: int) -> bytes:
    if number <= _SEVEN_BITS:
        return _ONE_BYTE[number]
    if number <= _FOURTEEN_BITS:
        return bytes((number & _SEVEN_BITS | 0x80, number >> 7))
    digits = bytearray()
    while number > _SEVEN_BITS:
        digits.append(number & _SEVEN_BITS | 0x80)
        number >>= 7
    digits.append(number)
    return bytes(digits)


def _field(tag: int, content: bytes) -> bytes:
    """A field with a length."""
    return b"%c%b%b" % (tag, _varint(len(content)), content)


def _text(tag: int, text: str) -> bytes:
    return _field(tag, text.encode())
