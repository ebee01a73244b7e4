"""A span as it is recorded, written and read: the same whether it comes from a relay or from a file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from opentelemetry.sdk.trace import ReadableSpan


@dataclass(slots=True)
class Span:
    """One span. Ids are in hexadecimal, times are Unix times in nanoseconds.

    Attributes:
        name: What it is called.
        trace_id: Of 32 digits.
        span_id: Of 16 digits.
        parent_id: Of the span around it; empty for a root.
        start_ns: When it began.
        end_ns: When it ended.
        attributes: What it says.
        resource: The attributes of what made it; the same object for all of one process.
        error: What went wrong; empty if nothing did, None where that is not said.
        links: Spans that it is linked to, by trace and span id.
        events: What happened in it: when, and what.
    """

    name: str
    trace_id: str
    span_id: str
    parent_id: str
    start_ns: int
    end_ns: int
    attributes: dict[str, Any]
    resource: Mapping[str, Any]
    error: str | None = None
    links: list[tuple[str, str]] = field(default_factory=list)
    events: list[tuple[int, str]] = field(default_factory=list)

    @property
    def duration_ns(self) -> int:
        """How long it took."""
        return self.end_ns - self.start_ns


def spans_of(made: Iterable[ReadableSpan]) -> list[Span]:
    """The same spans, as they are recorded."""
    spans = []
    for span in made:
        context, parent = span.context, span.parent
        assert context is not None
        links = [(f"{link.context.trace_id:032x}", f"{link.context.span_id:016x}") for link in span.links]
        status = span.status
        spans.append(
            Span(
                span.name,
                f"{context.trace_id:032x}",
                f"{context.span_id:016x}",
                "" if parent is None else f"{parent.span_id:016x}",
                span.start_time or 0,
                span.end_time or 0,
                dict(span._attributes or {}),
                span.resource.attributes,
                None if status.is_unset else "" if status.is_ok else status.description or "error",
                links,
                [(event.timestamp, event.name) for event in span.events],
            )
        )
    return spans
