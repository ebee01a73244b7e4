"""What all spans of a traced process have in common, and the spans of a step's stages."""

from __future__ import annotations

import logging
import os
import re
from typing import TYPE_CHECKING, Any, Final

from opentelemetry.attributes import BoundedAttributes
from opentelemetry.sdk.trace import SpanLimits
from opentelemetry.sdk.util import BoundedList

from otel_npu import semconv
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
        if type(attributes) is not SharedAttributes:
            attributes = self._bounded(attributes, own_attributes, error)
        span = OwnSpan(name, ids, self._resource, attributes, times_ns[0], max(times_ns))
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
        """The attributes, within the limits. What is our own and within them needs no more than its dict."""
        if isinstance(attributes, (SharedAttributes, BoundedAttributes)):
            return attributes
        if error is not None:
            attributes[semconv.ERROR_TYPE] = error
        if own_attributes:
            attributes = {**own_attributes, **attributes}
        most, longest = self._limits.max_span_attributes, self._limits.max_span_attribute_length
        if not own_attributes and longest is None and (most is None or len(attributes) <= most):
            return attributes
        return BoundedAttributes(most, attributes, immutable=False, max_value_len=longest)

    def stage_attributes(
        self,
        ran: Ran,
        *,
        more: dict[str, Any] | None = None,
        kept: Sequence[bool] | None = None,
        outer: dict[str, Any] | None = None,
    ) -> list[Any]:
        """What the span of each stage says, to give to `stages`; None for those that have no span.

        Args:
            ran: The step, and where its stages lie.
            more: What the span of each stage says beside what was measured.
            kept: Of each stage whether it has a span; with it the stage around it has one too. None: all have.
            outer: What those of the outermost say beside that.
        """
        attributes: list[Any] = []
        for index, (stage, place) in enumerate(zip(ran.step.stages, ran.placed, strict=True)):
            if kept is not None and not kept[index]:
                attributes.append(None)
                continue
            measured = _stage_attributes(stage, place)
            if more:
                measured.update(more)
            if outer and stage.parent < 0:
                measured.update(outer)
            attributes.append(self.shared(measured, stage.attributes, stage.error))
        return attributes

    def stages(
        self,
        ran: Ran,
        trace_id: bytes,
        parent_id: bytes,
        unix_ns: int,
        attributes: Sequence[Any],
        *,
        first: bytes = b"",
        links: Any = (),
    ) -> list[ReadableSpan]:
        """A span for each stage of a step, nested as the stages were.

        Args:
            ran: The step, and where its stages lie.
            trace_id: The trace of the spans.
            parent_id: The span around the outermost, if there is one.
            unix_ns: Unix time minus the host's monotonic time.
            attributes: Of each stage, as `stage_attributes` makes them.
            first: The id of the first stage's span, if it is given. Without a parent it is the root of the trace, and
                stages that merely overlap with it are its children all the same.
            links: Links of the outermost.
        """
        stages, on_host = ran.step.stages, semconv.HOST_TIMED if ran.has_device else ""
        random = os.urandom(8 * len(stages))
        own_ids = [random[at : at + 8] for at in range(0, len(random), 8)]
        if first and own_ids:
            own_ids[0] = first
        spans = []
        for own_id, stage, place, said in zip(own_ids, stages, ran.placed, attributes, strict=True):
            if said is None:
                continue
            around = own_ids[stage.parent] if stage.parent >= 0 else parent_id or (first if own_id != first else b"")
            spans.append(
                self.span(
                    stage.name if stage.device_ns is not None else stage.name + on_host,
                    (trace_id, own_id, around),
                    said,
                    (place.start_ns + unix_ns, place.end_ns + unix_ns),
                    error=stage.error,
                    links=links if stage.parent < 0 else (),
                )
            )
        return spans

    def links(self, links: Iterable[bytes]) -> Links:
        """Links to these spans, each as it is in a frame."""
        return Links(self._limits.max_links, links)


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
