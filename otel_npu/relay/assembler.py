"""Frames become spans: placed on the wall clock, nested, linked, with the process's resource."""

from __future__ import annotations

import logging
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
    from otel_npu.relay.clock import Placement
    from otel_npu.relay.wall import WallClock
    from otel_npu.wire.frames import Attributes, Hello, Ping, Stage, Step, Unfinished

_log = logging.getLogger("otel_npu.relay")

SCOPE: Final = InstrumentationScope(semconv.SCOPE, __version__, semconv.SCHEMA_URL)
_SAMPLED: Final = TraceFlags(TraceFlags.SAMPLED)
_UNSET: Final = Status(StatusCode.UNSET)
# A decode batch links to every request it serves; OpenTelemetry's default of 128 would lose the rest.
_MAX_LINKS: Final = 4096
_DEFAULT_LIMIT: Final = 128
_MAX_OUTER: Final = 256


class _Placed(NamedTuple):
    """Where a stage lies on the host's monotonic clock, in nanoseconds, and how sure that is."""

    start_ns: int
    end_ns: int
    uncertainty_ns: int | None


class _Group(NamedTuple):
    """A stage and the stages inside it: the bounds of host time minus device time, and where on the device they lie."""

    earliest: int
    latest: int
    first_ns: int
    last_ns: int


class _Line(NamedTuple):
    """Host time minus device time across a step, and how far it may be off, each a line between the step's two ends.

    What is possible at a device time is convex (see `relay.clock`), so in between it is never more than this says.
    """

    first_ns: int
    shift_ns: int
    shift_rate: float
    uncertainty_ns: int
    uncertainty_rate: float

    @classmethod
    def through(cls, first_ns: int, first: Placement, last_ns: int, last: Placement) -> _Line:
        """The line through the placements of two device times."""
        shift_ns, length_ns = first.host_ns - first_ns, max(1, last_ns - first_ns)
        return cls(
            first_ns,
            shift_ns,
            (last.host_ns - last_ns - shift_ns) / length_ns,
            first.uncertainty_ns,
            (last.uncertainty_ns - first.uncertainty_ns) / length_ns,
        )

    def place(self, group: _Group, least: int) -> tuple[int, int]:
        """The shift in the group's middle, within its bounds and not below `least`, and how far off it may be in it."""
        rate, from_ns = self.shift_rate, self.first_ns
        middle_ns = (group.first_ns + group.last_ns) // 2
        # Where the bounds leave nothing, the enqueueing is the one that is certain.
        shift_ns = max(min(self.shift_ns + round(rate * (middle_ns - from_ns)), group.latest), group.earliest, least)
        # The two clocks' rates differ, so one shift can't be right at both ends.
        before_ns, after_ns = group.first_ns - from_ns, group.last_ns - from_ns
        off_ns = shift_ns - self.shift_ns
        uncertainty_ns = self.uncertainty_ns + max(
            abs(off_ns - rate * before_ns) + self.uncertainty_rate * before_ns,
            abs(off_ns - rate * after_ns) + self.uncertainty_rate * after_ns,
        )
        return shift_ns, int(uncertainty_ns) + 1


def span_limits() -> SpanLimits:
    """The standard limits, but with room for the links of a large batch unless the environment says otherwise."""
    chosen = os.environ.get("OTEL_SPAN_LINK_COUNT_LIMIT", "").strip()
    try:
        return SpanLimits() if chosen else SpanLimits(max_links=_MAX_LINKS)
    except ValueError as error:
        _log.error("%s; no limit in the environment is used", error)
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
        self._resolution_ns = hello.device_resolution_ns
        self._wall = wall
        self._limits = limits
        self._clocks: dict[int, DeviceClock] = {}
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

    def _extent(self, step: Step, placed: list[_Placed]) -> tuple[int, int]:
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

    def ping(self, ping: Ping) -> None:
        """Learn from a look at a device's clock."""
        clock = self._clock(ping.device_index)
        clock.lower(ping.device_ns, ping.before_ns)
        clock.upper(ping.device_ns, ping.seen_ns)

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
            clock = self._clock(device)
            clock.lower(device_ns, host_ns)
            clock.upper(latest[device], step.seen_ns)

    def _clock(self, device_index: int) -> DeviceClock:
        clock = self._clocks.get(device_index)
        if clock is None:
            clock = self._clocks[device_index] = DeviceClock(self._resolution_ns)
        return clock

    def _place(self, step: Step) -> list[_Placed]:
        """Place each outermost stage by its middle; the stages inside keep their exact distances from it."""
        stages = step.stages
        roots: list[int] = []
        groups: dict[int, _Group] = {}
        for index, stage in enumerate(stages):
            inside = stage.parent >= 0 and _same_clock(stage, stages[stage.parent])
            root = roots[stage.parent] if inside else index
            roots.append(root)
            if stage.device_ns is not None:
                # Neither event can have happened before it was enqueued, nor after it was seen done.
                first_ns, last_ns = stage.device_ns, stage.device_ns + stage.duration_ns
                earliest, latest = max(stage.entered_ns - first_ns, stage.exited_ns - last_ns), step.seen_ns - last_ns
                if root != index:
                    around = groups[root]
                    earliest, latest = max(earliest, around.earliest), min(latest, around.latest)
                    first_ns, last_ns = min(first_ns, around.first_ns), max(last_ns, around.last_ns)
                groups[root] = _Group(earliest, latest, first_ns, last_ns)
        lines = self._lines(stages, groups)
        shifts: dict[int, tuple[int, int | None]] = {}
        started: dict[tuple[int, int], int] = {}
        for root, group in groups.items():
            stage = stages[root]
            device_ns = stage.device_ns or 0
            line = lines[stage.device_index]
            # A stream works in order, whatever the bounds of each have done.
            stream = stage.device_index, stage.stream_id
            least = started.get(stream, group.earliest + device_ns) - device_ns
            shift = (max(group.earliest, least), None) if line is None else line.place(group, least)
            started[stream] = device_ns + shift[0]
            shifts[root] = shift
        placed: list[_Placed] = []
        for stage, root in zip(stages, roots, strict=True):
            if stage.device_ns is None:
                place = _Placed(stage.entered_ns, stage.entered_ns + stage.duration_ns, None)
            else:
                shift_ns, uncertainty_ns = shifts[root]
                start_ns = stage.device_ns + shift_ns
                place = _Placed(start_ns, start_ns + stage.duration_ns, uncertainty_ns)
            # On another stream, or by another clock, it may well reach beyond what is around it.
            inside = stage.parent >= 0 and _same_stream(stage, stages[stage.parent])
            placed.append(_within(place, placed[stage.parent]) if inside else place)
        return placed

    def _lines(self, stages: list[Stage], groups: dict[int, _Group]) -> dict[int, _Line | None]:
        """Of each device the line through the step's first and last device time; None where there is no map yet."""
        ends: dict[int, tuple[int, int, int, int]] = {}
        for root, group in groups.items():
            stage = stages[root]
            near_ns = stage.entered_ns
            first_ns, near_first_ns, last_ns, near_last_ns = ends.get(
                stage.device_index, (group.first_ns, near_ns, group.last_ns, near_ns)
            )
            if group.first_ns < first_ns:
                first_ns, near_first_ns = group.first_ns, near_ns
            if group.last_ns > last_ns:
                last_ns, near_last_ns = group.last_ns, near_ns
            ends[stage.device_index] = first_ns, near_first_ns, last_ns, near_last_ns
        lines: dict[int, _Line | None] = {}
        for device, (first_ns, near_first_ns, last_ns, near_last_ns) in ends.items():
            clock = self._clocks[device]
            first, last = clock.at(first_ns, near_first_ns), clock.at(last_ns, near_last_ns)
            lines[device] = None if first is None or last is None else _Line.through(first_ns, first, last_ns, last)
        return lines

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


def _same_clock(stage: Stage, around: Stage) -> bool:
    return around.device_index == stage.device_index and (around.device_ns is None) == (stage.device_ns is None)


def _same_stream(stage: Stage, around: Stage) -> bool:
    return stage.stream_id == around.stream_id and _same_clock(stage, around)


def _within(place: _Placed, around: _Placed) -> _Placed:
    """The place, cut to what is around it: rounded times and different clocks may disagree a little."""
    if around.start_ns <= place.start_ns <= place.end_ns <= around.end_ns:
        return place
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
