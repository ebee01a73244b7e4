"""Frames become spans: placed on the wall clock, nested, linked, with the process's resource."""

from __future__ import annotations

import logging
import os
import re
from typing import TYPE_CHECKING, Any, Final

from opentelemetry.attributes import BoundedAttributes
from opentelemetry.sdk.trace import ReadableSpan, SpanLimits
from opentelemetry.sdk.util import BoundedList
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags

from otel_npu import semconv
from otel_npu._version import __version__
from otel_npu.relay.placing import Place, Timeline
from otel_npu.relay.resources import resource_of

if TYPE_CHECKING:
    from otel_npu.relay.wall import WallClock
    from otel_npu.wire.frames import Attributes, Hello, Stage, Step, Unfinished

_log = logging.getLogger("otel_npu.relay")

SCOPE: Final = InstrumentationScope(semconv.SCOPE, __version__, semconv.SCHEMA_URL)
_SAMPLED: Final = TraceFlags(TraceFlags.SAMPLED)
_UNSET: Final = Status(StatusCode.UNSET)
# A decode batch links to every request it serves; OpenTelemetry's default of 128 would lose the rest.
_MAX_LINKS: Final = 4096
_DEFAULT_LIMIT: Final = 128
_MAX_OUTER: Final = 256


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


class Assembler:
    """Makes the spans of one traced process.

    Args:
        hello: The process's first frame.
        wall: The wall clock of this host.
        limits: How many attributes and links a span has at most.
    """

    def __init__(self, hello: Hello, wall: WallClock, limits: SpanLimits) -> None:
        self._resource = resource_of(hello)
        self._wall = wall
        self._limits = limits
        self.timeline = Timeline(hello.device_resolution_ns)
        self._inside: dict[bytes, tuple[int, int]] = {}
        """By the span id of a step that is still to come: from where to where the steps inside it reach."""
        self._dropped: dict[str, int] = {}

    def replaces(self, other: Assembler | None) -> None:
        """Take over what another has still to report."""
        if other is not None:
            self.count_drops(other._dropped)

    def count_drops(self, counts: dict[str, int]) -> None:
        """Drops to report with the process's next step span."""
        for reason, count in counts.items():
            self._dropped[reason] = self._dropped.get(reason, 0) + count

    def step(self, step: Step) -> list[ReadableSpan]:
        """The spans of a step: none if it is not kept as a trace."""
        self.timeline.learn(step)
        self.count_drops(step.dropped)
        if not step.trace_id:
            return []
        stages, placed = step.stages, self.timeline.place(step)
        trace_id = int.from_bytes(step.trace_id, "big")
        unix_ns = self._wall.offset_ns()
        parent = _context(trace_id, step.span_id if not step.bare else step.parent_span_id)
        random = os.urandom(8 * len(stages))
        contexts = [_context(trace_id, random[8 * index : 8 * index + 8]) for index in range(len(stages))]
        if step.bare and contexts:
            contexts[0] = _context(trace_id, step.span_id)  # what a step inside it has as its parent
        links = self._links(step.links)
        spans = []
        for index, (stage, place) in enumerate(zip(stages, placed, strict=True)):
            spans.append(
                self._span(
                    stage.name,
                    contexts[index],
                    contexts[stage.parent] if stage.parent >= 0 else parent,
                    _stage_attributes(stage, place),
                    stage.attributes,
                    (place.start_ns + unix_ns, place.end_ns + unix_ns),
                    error=stage.error,
                    links=links if step.bare and stage.parent < 0 else (),
                )
            )
        if not step.bare:
            dropped, self._dropped = self._dropped, {}
            start_ns, end_ns = self._extent(step, placed)
            spans.append(
                self._span(
                    semconv.WORKER_STEP,
                    parent,
                    _context(trace_id, step.parent_span_id),
                    _step_attributes(step, dropped),
                    step.attributes,
                    (start_ns + unix_ns, end_ns + unix_ns),
                    error=step.error,
                    links=links,
                )
            )
        return spans

    def _extent(self, step: Step, placed: list[Place]) -> tuple[int, int]:
        """From the first stage of a step to its last, those of steps inside it included: they have come before it."""
        start_ns = min((place.start_ns for place in placed), default=step.opened_ns)
        end_ns = max((place.end_ns for place in placed), default=step.closed_ns)
        inside = self._inside.pop(step.span_id, (start_ns, end_ns))
        extent = min(start_ns, inside[0]), max(end_ns, inside[1])
        if step.parent_span_id:
            beside = self._inside.get(step.parent_span_id, extent)
            self._inside[step.parent_span_id] = min(extent[0], beside[0]), max(extent[1], beside[1])
            if len(self._inside) > _MAX_OUTER:  # most parents are the program's own spans
                del self._inside[next(iter(self._inside))]
        return extent

    def unfinished(self, frame: Unfinished) -> ReadableSpan:
        """The span of a stage that hangs: it ends now, and says that it is not over."""
        trace_id = int.from_bytes(frame.trace_id, "big")
        unix_ns = self._wall.offset_ns()
        seconds = (frame.now_ns - frame.entered_ns) * 1e-9
        attributes: dict[str, Any] = {
            semconv.STAGE_NAME: frame.name,
            semconv.STEP_NUMBER: frame.step_number,
            semconv.STEP_KIND: frame.step_kind,
            semconv.DEVICE_INDEX: frame.device_index,
            semconv.UNFINISHED_FOR: seconds,
            semconv.TIMING: semconv.TIMING_HOST,
        }
        return self._span(
            semconv.UNFINISHED_STAGE,
            _context(trace_id, os.urandom(8)),
            _context(trace_id, frame.parent_span_id),
            attributes,
            None,
            (frame.entered_ns + unix_ns, frame.now_ns + unix_ns),
            error="unfinished",
            message=f"stage {frame.name!r} has been unfinished for {seconds:.1f} s",
        )

    def _links(self, links: list[bytes]) -> BoundedList[Link]:
        return BoundedList.from_seq(
            self._limits.max_links,
            (
                Link(
                    SpanContext(
                        int.from_bytes(link[:16], "big"),
                        int.from_bytes(link[16:24], "big"),
                        is_remote=True,
                        trace_flags=TraceFlags(link[24]),
                    )
                )
                for link in links
            ),
        )

    def _span(
        self,
        name: str,
        context: SpanContext | None,
        parent: SpanContext | None,
        attributes: dict[str, Any],
        own_attributes: Attributes | None,
        times_ns: tuple[int, int],
        *,
        error: str | None = None,
        message: str | None = None,
        links: Any = (),
    ) -> ReadableSpan:
        if error is not None:
            attributes[semconv.ERROR_TYPE] = error
        if own_attributes:
            # What the program says of its stage never hides what was measured.
            attributes = {**own_attributes, **attributes}
        return ReadableSpan(
            name,
            context,
            parent,
            self._resource,
            BoundedAttributes(
                self._limits.max_span_attributes,
                attributes,
                immutable=False,
                max_value_len=self._limits.max_span_attribute_length,
            ),
            (),
            links,
            SpanKind.INTERNAL,
            None,
            Status(StatusCode.ERROR, message or error) if error is not None else _UNSET,
            times_ns[0],
            max(times_ns),
            SCOPE,
        )


def _context(trace_id: int, span_id: bytes) -> SpanContext | None:
    if not span_id:
        return None
    return SpanContext(trace_id, int.from_bytes(span_id, "big"), is_remote=False, trace_flags=_SAMPLED)


def _stage_attributes(stage: Stage, place: Place) -> dict[str, Any]:
    on_device = stage.device_ns is not None
    attributes: dict[str, Any] = {
        semconv.TIMING: semconv.TIMING_DEVICE if on_device else semconv.TIMING_HOST,
        semconv.HOST_DURATION: (stage.exited_ns - stage.entered_ns) * 1e-9,
    }
    if on_device:
        attributes[semconv.DEVICE_INDEX] = stage.device_index
        attributes[semconv.STREAM_ID] = stage.stream_id
        attributes[semconv.ENQUEUE_DELAY] = max(0, place.start_ns - stage.entered_ns) * 1e-9
        if place.uncertainty_ns is not None:
            attributes[semconv.CLOCK_UNCERTAINTY] = place.uncertainty_ns * 1e-9
    return attributes


def _step_attributes(step: Step, dropped: dict[str, int]) -> dict[str, Any]:
    attributes: dict[str, Any] = {
        semconv.STEP_NUMBER: step.number,
        semconv.STEP_STAGES: len(step.stages),
    }
    if step.kind:
        attributes[semconv.STEP_KIND] = step.kind
    for reason, count in dropped.items():
        attributes[semconv.DROPPED_PREFIX + reason] = count
    return attributes
