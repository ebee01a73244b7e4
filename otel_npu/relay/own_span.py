"""A span of our own making: as a receiver of OTLP wants it, and for whoever else takes spans one of the SDK's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

from otel_npu import semconv
from otel_npu._version import __version__

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource

SCOPE: Final = InstrumentationScope(semconv.SCOPE, __version__, semconv.SCHEMA_URL)
_SAMPLED: Final = TraceFlags(TraceFlags.SAMPLED)
_UNSET: Final = Status(StatusCode.UNSET)


class OwnSpan(ReadableSpan):
    """One span. Its ids are bytes, as in frames and in OTLP: objects are made of them only for somebody who asks.

    A request of 16 tokens has some twenty, and what a span costs the relay is mostly the making of objects.

    Attributes:
        trace_id: 16 bytes.
        span_id: 8 bytes.
        parent_id: 8 bytes, or none for a root.
    """

    # What all have in common, under the names that the SDK's class reads.
    _kind = SpanKind.INTERNAL
    _instrumentation_info = None
    _instrumentation_scope = SCOPE
    _events: Any = ()
    _links: Any = ()
    _status = _UNSET

    def __init__(
        self,
        name: str,
        ids: tuple[bytes, bytes, bytes],
        resource: Resource,
        attributes: Any,
        start_ns: int,
        end_ns: int,
    ) -> None:
        """Make one: ids are the trace's, its own and its parent's; times are Unix times."""
        self._name = name
        self.trace_id, self.span_id, self.parent_id = ids
        self._resource = resource
        self._attributes = attributes
        self._start_time = start_ns
        self._end_time = end_ns

    def failed(self, error: str, message: str | None = None) -> None:
        """Something of this type went wrong in it."""
        self._status = Status(StatusCode.ERROR, message or error)

    @property
    def _context(self) -> SpanContext:  # type: ignore[override]
        return _context(self.trace_id, self.span_id)

    @property
    def _parent(self) -> SpanContext | None:  # type: ignore[override]
        return _context(self.trace_id, self.parent_id) if self.parent_id else None


def _context(trace_id: bytes, span_id: bytes) -> SpanContext:
    ids = int.from_bytes(trace_id, "big"), int.from_bytes(span_id, "big")
    return SpanContext(*ids, is_remote=False, trace_flags=_SAMPLED)
