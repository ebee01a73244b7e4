"""What all spans of a traced process have in common, and the spans of a step's stages."""

from __future__ import annotations

import logging
import os
import re
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from opentelemetry.attributes import BoundedAttributes
from opentelemetry.sdk.trace import SpanLimits
from opentelemetry.sdk.util import BoundedList

from otel_npu import semconv
from otel_npu.ids import new_bytes
from otel_npu.relay.encoding import SharedAttributes
from otel_npu.relay.links import Links
from otel_npu.relay.own_span import OwnSpan

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import Event, ReadableSpan

    from otel_npu.relay.placing import Place, Ran
    from otel_npu.wire.frames import Attributes, Stage

_log = logging.getLogger("otel_npu.relay")

# A decode batch links to every request it serves; OpenTelemetry's default of 128 would lose the rest.
_MAX_LINKS: Final = 4096
_DEFAULT_LIMIT: Final = 128
_BOUNDED: Final = (SharedAttributes, BoundedAttributes)
_PLAIN: Final = (str, int, float, bool)


def span_limits() -> SpanLimits:
    """The standard limits, but with room for the links of a large batch unless the environment says otherwise."""
    chosen = os.environ.get("OTEL_SPAN_LINK_COUNT_LIMIT", "").strip()
    try:
        return SpanLimits() if chosen else SpanLimits(max_links=_MAX_LINKS)
    except ValueError:
        # In words of our own: some versions of the SDK trip over theirs.
        bad = [
            f"{variable}={value!r}"
            for variable, value in os.environ.items()
            if re.fullmatch(r"OTEL_\w+_LIMIT", variable) and not re.fullmatch(r"\s*\d*\s*", value)
        ]
        _log.error("%s: takes a whole number, 0 or more; no limit in the environment is used", ", ".join(bad))
        default, unset = _DEFAULT_LIMIT, SpanLimits.UNSET
        return SpanLimits(default, default, _MAX_LINKS, default, default, default, unset, unset)


class SpanMaker:
    """Makes the spans of one traced process.

    Args:
        resource: The process.
        limits: How many attributes, links and events a span has at most.
    """

    def __init__(self, resource: Resource, limits: SpanLimits) -> None:
        self._resource = resource
        self._limits = limits

    def span(
        self,
        name: str,
        ids: tuple[bytes, bytes, bytes],
        attributes: Any,
        times_ns: tuple[int, int],
        *,
        own_attributes: Attributes | None = None,
        error: str | None = None,
        message: str | None = None,
        links: Any = (),
        events: Sequence[Event] = (),
    ) -> ReadableSpan:
        """One span. `times_ns` are its start and end in Unix time; one that ends before its start ends with it.

        Args:
            name: What it is called.
            ids: Its trace's, its own, and its parent's: none for a root.
            attributes: What was measured, or what `shared` has made of it.
            times_ns: Start and end.
            own_attributes: What the program says of it; it never hides what was measured.
            error: The type of what went wrong.
            message: What went wrong, in words.
            links: As `links` makes them.
            events: What happened at an instant in it.
        """
        bounded = self._bounded(attributes, own_attributes, error)
        span = OwnSpan(name, ids, self._resource, bounded, times_ns[0], max(times_ns))
        if links:
            span._links = links
        if events:
            span._events = BoundedList.from_seq(self._limits.max_events, events)
        if error is not None:
            span.failed(error, message)
        return span

    def shared(
        self, attributes: dict[str, Any], own_attributes: Attributes | None = None, error: str | None = None
    ) -> Any:
        """The attributes of spans that differ in nothing but their places: made, and encoded, once for all of them."""
        bounded = self._bounded(attributes, own_attributes, error)
        return bounded if getattr(bounded, "dropped", 0) else SharedAttributes(bounded)

    def _bounded(self, attributes: Any, own_attributes: Attributes | None, error: str | None) -> Any:
        """The attributes, within the limits. What is within them, and plain, needs no more than its dict."""
        if type(attributes) in _BOUNDED:  # isinstance() asks an abstract class, which takes longer than all else here
            return attributes
        if error is not None:
            attributes[semconv.ERROR_TYPE] = error
        if own_attributes:
            attributes = {**own_attributes, **attributes}
        most, longest = self._limits.max_span_attributes, self._limits.max_span_attribute_length
        plain = not own_attributes or all(key and type(value) in _PLAIN for key, value in own_attributes.items())
        if plain and longest is None and (most is None or len(attributes) <= most):
            return attributes
        return BoundedAttributes(most, attributes, immutable=False, max_value_len=longest)

    def stages(
        self,
        ran: Ran,
        *,
        more: dict[str, Any] | None = None,
        kept: Sequence[bool] | None = None,
        outer: dict[str, Any] | None = None,
    ) -> StageSpans:
        """The spans of a step's stages, in whatever traces they will be.

        Args:
            ran: The step, and where its stages lie.
            more: What the span of each stage says beside what was measured.
            kept: Of each stage whether it has a span; with it the stage around it has one too. None: all have.
            outer: What those of the outermost say beside that.
        """
        on_host = semconv.HOST_TIMED if ran.has_device else ""
        made: list[_StageSpan] = []
        at: list[int] = []
        """Of each stage, which of the spans it has."""
        for index, (stage, place) in enumerate(zip(ran.step.stages, ran.placed, strict=True)):
            at.append(len(made))
            if kept is not None and not kept[index]:
                continue
            measured = _stage_attributes(stage, place)
            if more:
                measured.update(more)
            if outer and stage.parent < 0:
                measured.update(outer)
            said = self.shared(measured, stage.attributes, stage.error)
            name = stage.name if stage.device_ns is not None else stage.name + on_host
            around = at[stage.parent] if stage.parent >= 0 else -1
            made.append((name, said, place.start_ns, max(place.start_ns, place.end_ns), around, stage.error))
        return StageSpans(self._resource, made)

    def links(self, links: Iterable[bytes]) -> Links:
        """Links to these spans, each as it is in a frame."""
        return Links(self._limits.max_links, links)


_StageSpan: TypeAlias = tuple[str, Any, int, int, int, "str | None"]
"""Of a stage's span the name, the attributes, start and end on the host's monotonic clock, which span of its list is
around it (-1: none of them), and the error."""


class StageSpans:
    """The spans of a step's stages but for the trace that they are in: made once for all requests that show the step.

    Args:
        resource: The process.
        made: What is known of each.
    """

    __slots__ = ("_made", "_resource")

    def __init__(self, resource: Resource, made: list[_StageSpan]) -> None:
        self._resource = resource
        self._made = made

    def within(
        self, trace_id: bytes, parent_id: bytes, unix_ns: int, *, first: bytes = b"", links: Any = ()
    ) -> list[ReadableSpan]:
        """They themselves in one trace, nested as the stages were.

        Args:
            trace_id: The trace.
            parent_id: The span around the outermost, if there is one.
            unix_ns: Unix time minus the host's monotonic time.
            first: The id of the first stage's span, if it is given. Without a parent it is the root of the trace, and
                stages that merely overlap with it are its children all the same.
            links: Links of the outermost.
        """
        random = new_bytes(8 * len(self._made))
        ids = [random[at : at + 8] for at in range(0, len(random), 8)]
        if first and ids:
            ids[0] = first
        spans: list[ReadableSpan] = []
        for span_id, (name, said, start_ns, end_ns, around, error) in zip(ids, self._made, strict=True):
            outer_id = ids[around] if around >= 0 else parent_id or (first if spans else b"")
            span = OwnSpan(
                name, (trace_id, span_id, outer_id), self._resource, said, start_ns + unix_ns, end_ns + unix_ns
            )
            if links and around < 0:
                span._links = links
            if error is not None:
                span.failed(error)
            spans.append(span)
        return spans


def _stage_attributes(stage: Stage, place: Place) -> dict[str, Any]:
    on_device = stage.device_ns is not None
    attributes: dict[str, Any] = {
        semconv.TIMING: semconv.TIMING_DEVICE if on_device else semconv.TIMING_HOST,
        semconv.HOST_DURATION: semconv.seconds(stage.exited_ns - stage.entered_ns),
    }
    if on_device:
        attributes[semconv.DEVICE_DURATION] = semconv.seconds(stage.duration_ns)
        attributes[semconv.DEVICE_INDEX] = stage.device_index
        attributes[semconv.STREAM_ID] = stage.stream_id
        delay_ns = max(0, place.start_ns - stage.entered_ns)
        attributes[semconv.ENQUEUE_DELAY] = semconv.seconds(delay_ns)
        if place.uncertainty_ns is not None:
            attributes[semconv.CLOCK_UNCERTAINTY] = semconv.seconds(place.uncertainty_ns)
    return attributes
