"""Frames become spans: placed on the wall clock, nested, linked, with the process's resource."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from opentelemetry.attributes import BoundedAttributes
from opentelemetry.sdk.trace import ReadableSpan, SpanLimits
from opentelemetry.sdk.util import BoundedList
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags

from otel_npu import semconv
from otel_npu._version import __version__
from otel_npu.relay.clock import DeviceClock
from otel_npu.relay.resources import resource_of

if TYPE_CHECKING:
    from otel_npu.relay.wall import WallClock
    from otel_npu.wire.frames import Attributes, Hello, Stage, Step, Unfinished

SCOPE: Final = InstrumentationScope(semconv.SCOPE, __version__, semconv.SCHEMA_URL)
_SAMPLED: Final = TraceFlags(TraceFlags.SAMPLED)
_UNSET: Final = Status(StatusCode.UNSET)
# A decode batch links to every request it serves; OpenTelemetry's default of 128 would lose the rest.
_MAX_LINKS: Final = 4096


class _Placed(NamedTuple):
    """Where a stage lies on the host's monotonic clock, in nanoseconds, and how sure that is."""

    start_ns: int
    end_ns: int
    uncertainty_ns: int | None


def span_limits() -> SpanLimits:
    """The standard limits, but with room for the links of a large batch unless the environment says otherwise."""
    if os.environ.get("OTEL_SPAN_LINK_COUNT_LIMIT", "").strip():
        return SpanLimits()
    return SpanLimits(max_links=_MAX_LINKS)


class Assembler:
    """Makes the spans of one traced process.

    Args:
        hello: The process's first frame.
        wall: The wall clock of this host.
        limits: How many attributes and links a span has at most.
    """

    def __init__(self, hello: Hello, wall: WallClock, limits: SpanLimits) -> None:
        self._resource = resource_of(hello)
        self._resolution_ns = hello.device_resolution_ns
        self._wall = wall
        self._limits = limits
        self._clocks: dict[int, DeviceClock] = {}
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
        self._learn(step)
        self.count_drops(step.dropped)
        if not step.trace_id:
            return []
        stages, placed = step.stages, self._place(step)
        trace_id = int.from_bytes(step.trace_id, "big")
        unix_ns = self._wall.offset_ns()
        parent = _context(trace_id, step.span_id if not step.bare else step.parent_span_id)
        random = os.urandom(8 * len(stages))
        contexts = [_context(trace_id, random[8 * index : 8 * index + 8]) for index in range(len(stages))]
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
                    place.start_ns + unix_ns,
                    place.end_ns + unix_ns,
                    error=stage.error,
                    links=links if step.bare and stage.parent < 0 else (),
                )
            )
        if not step.bare:
            dropped, self._dropped = self._dropped, {}
            spans.append(
                self._span(
                    semconv.WORKER_STEP,
                    parent,
                    _context(trace_id, step.parent_span_id),
                    _step_attributes(step, dropped),
                    step.attributes,
                    min((place.start_ns for place in placed), default=step.opened_ns) + unix_ns,
                    max((place.end_ns for place in placed), default=step.closed_ns) + unix_ns,
                    error=step.error,
                    links=links,
                )
            )
        return spans

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
            frame.entered_ns + unix_ns,
            frame.now_ns + unix_ns,
            error="unfinished",
            message=f"stage {frame.name!r} has been unfinished for {seconds:.1f} s",
        )

    def _learn(self, step: Step) -> None:
        """What the step's stages say about their devices' clocks: of each side's bounds the tightest will do."""
        tightest: dict[int, tuple[int, int, int]] = {}
        latest: dict[int, int] = {}
        for stage in step.stages:
            if stage.device_ns is None:
                continue
            device, end_ns = stage.device_index, stage.device_ns + stage.duration_ns
            latest[device] = max(latest.get(device, end_ns), end_ns)
            for device_ns, host_ns in ((stage.device_ns, stage.entered_ns), (end_ns, stage.exited_ns)):
                if device not in tightest or host_ns - device_ns > tightest[device][0]:
                    tightest[device] = (host_ns - device_ns, device_ns, host_ns)
        for device, (_, device_ns, host_ns) in tightest.items():
            clock = self._clocks.get(device)
            if clock is None:
                clock = self._clocks[device] = DeviceClock(self._resolution_ns)
            clock.lower(device_ns, host_ns)
            clock.upper(latest[device], step.seen_ns)

    def _place(self, step: Step) -> list[_Placed]:
        """Place each outermost stage by its middle; the stages inside keep their exact distances from it."""
        stages = step.stages
        roots: list[int] = []
        earliest: dict[int, int] = {}
        for index, stage in enumerate(stages):
            inside = stage.parent >= 0 and _same_clock(stage, stages[stage.parent])
            root = roots[stage.parent] if inside else index
            roots.append(root)
            if stage.device_ns is not None:
                # Neither event can have happened before it was enqueued.
                bound = max(
                    stage.entered_ns - stage.device_ns, stage.exited_ns - stage.device_ns - stage.duration_ns
                )
                earliest[root] = max(earliest.get(root, bound), bound)
        shifts = {root: self._shift(stages[root], bound) for root, bound in earliest.items()}
        placed: list[_Placed] = []
        for stage, root in zip(stages, roots, strict=True):
            if stage.device_ns is None:
                place = _Placed(stage.entered_ns, stage.entered_ns + stage.duration_ns, None)
            else:
                shift_ns, uncertainty_ns = shifts[root]
                start_ns = stage.device_ns + shift_ns
                place = _Placed(start_ns, start_ns + stage.duration_ns, uncertainty_ns)
            placed.append(place if stage.parent < 0 else _within(place, placed[stage.parent]))
        return placed

    def _shift(self, stage: Stage, earliest_ns: int) -> tuple[int, int | None]:
        """Host time minus device time round this stage, not below the bound, and its uncertainty."""
        assert stage.device_ns is not None
        middle_ns = stage.device_ns + stage.duration_ns // 2
        placement = self._clocks[stage.device_index].at(middle_ns, stage.entered_ns)
        if placement is None:
            return earliest_ns, None
        return max(placement.host_ns - middle_ns, earliest_ns), placement.uncertainty_ns

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
        start_ns: int,
        end_ns: int,
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
            start_ns,
            max(start_ns, end_ns),
            SCOPE,
        )


def _same_clock(stage: Stage, around: Stage) -> bool:
    return around.device_index == stage.device_index and (around.device_ns is None) == (stage.device_ns is None)


def _within(place: _Placed, around: _Placed) -> _Placed:
    """The place, cut to what is around it: rounded times and different clocks may disagree a little."""
    start_ns = min(max(place.start_ns, around.start_ns), around.end_ns)
    return _Placed(start_ns, min(max(place.end_ns, start_ns), around.end_ns), place.uncertainty_ns)


def _context(trace_id: int, span_id: bytes) -> SpanContext | None:
    if not span_id:
        return None
    return SpanContext(trace_id, int.from_bytes(span_id, "big"), is_remote=False, trace_flags=_SAMPLED)


def _stage_attributes(stage: Stage, place: _Placed) -> dict[str, Any]:
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
