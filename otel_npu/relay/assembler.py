"""A process's frames become spans: placed on the wall clock, nested, linked, with the process's resource."""

from __future__ import annotations

import math
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Final, Protocol

import msgspec

from otel_npu import semconv
from otel_npu.drops import Drops, add_up
from otel_npu.ids import new_bytes
from otel_npu.relay.keeping import Keeping
from otel_npu.relay.making import Unmade
from otel_npu.relay.placing import Ran, Timeline
from otel_npu.relay.verdicts import Bubbles, launch_bound
from otel_npu.slow import SlowSteps

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from opentelemetry.sdk.trace import ReadableSpan, SpanLimits

    from otel_npu.relay.placing import Placed
    from otel_npu.relay.spans import SpanMaker
    from otel_npu.relay.wall import WallClock
    from otel_npu.wire.frames import Hello, Scheduled, Step, Unfinished

_MAX_OUTER: Final = 256


class Counting(Protocol):
    """What is told of one process, kept as a trace or not; times are the host's monotonic clock's, in nanoseconds."""

    def ran(self, ran: Ran) -> None:
        """A step has run."""

    def scheduled(self, frame: Scheduled) -> None:
        """An engine has scheduled a step, or says that requests have left it."""

    def straggled(self, kind: str, skew_ns: int, ran: Ran) -> None:
        """In a step of this kind the others waited so long for this rank."""

    def kept(self, ran: Ran, spans: Sequence[ReadableSpan], reason: str) -> None:
        """A step has become a trace: these are its spans."""

    def request(
        self, reason: str | None, device_ns: int, attributed_ns: int, spans: Sequence[ReadableSpan], unix_ns: int
    ) -> None:
        """A request is over for this reason: how long its steps took, its share of that, and its spans."""

    def hang(self, frame: Unfinished) -> None:
        """A stage hangs."""

    def drops(self, counts: Mapping[str, int]) -> None:
        """The process has left out so much."""


class Assembler:
    """Makes the spans of one traced process.

    Args:
        hello: The process's first frame.
        wall: The wall clock of this host.
        limits: Says how many attributes and links a span has at most; asked with the first span.
        slow: Says which of its steps are slow, where no engine does; without it none is.
        counted: Told of all for the metrics, where there are any.
        drops: What the relay itself left out: the next step span says it, whosever it is.
    """

    def __init__(
        self,
        hello: Hello,
        wall: WallClock,
        limits: Callable[[], SpanLimits],
        slow: SlowSteps | None = None,
        counted: Counting | None = None,
        drops: Drops | None = None,
    ) -> None:
        self.hello = hello
        self.counted = counted
        self._drops = Drops() if drops is None else drops
        self._limits = limits
        self._has_device = hello.device_kind not in ("", "cpu")
        self._wall = wall
        self._keeping = Keeping(slow or SlowSteps(math.inf, Drops()))
        self.timeline = Timeline(hello.device_resolution_ns)
        self._inside: dict[bytes, tuple[int, int]] = {}
        """By the span id of a step that is still to come: from where to where the steps inside it reach."""
        self._dropped: dict[str, int] = {}
        self._bubbles = Bubbles()

    @cached_property
    def spans(self) -> SpanMaker:
        """Makes the process's spans."""
        from otel_npu.relay.resources import resource_of  # with the SDK, which is imported while frames are read
        from otel_npu.relay.spans import SpanMaker

        return SpanMaker(resource_of(self.hello), self._limits())

    def replaces(self, other: Assembler | None) -> None:
        """Take over what another has still to report."""
        if other is not None:
            self._dropped, other._dropped = other._dropped, {}

    def count_drops(self, counts: dict[str, int]) -> None:
        """Drops of the process, to report with its next step span."""
        add_up(self._dropped, counts)

    def take_drops(self) -> dict[str, int]:
        """The drops that the step span which is made now reports: the process's, and the relay's own.

        Taken no earlier: of most steps no span is made, and their process may be gone before one is.
        """
        dropped, self._dropped = self._dropped, {}
        add_up(dropped, self._drops.take_unsent())
        return dropped

    def part(self) -> None:
        """The process has gone: what it has left out, and no step span has said, another process's will."""
        dropped, self._dropped = self._dropped, {}
        self._drops.put_back(dropped)

    def step(self, step: Step, join: Callable[[Ran], Sequence[ReadableSpan]] | None = None) -> Sequence[ReadableSpan]:
        """The spans of a step, and of those inside it that are kept with it: none if it is not kept as a trace.

        They are made later, when somebody looks at them.

        Args:
            step: The frame.
            join: Told of a step that is a rank's part of an engine's step; gives its spans if it is kept. `kept` makes
                them, then or later.
        """
        self._complete(step)
        self.count_drops(step.dropped)
        inside = self._inside.pop(step.span_id, None) if self._inside else None
        place = self._place if inside is None else partial(self._place, inside=inside)
        ran = Ran(step, place, self._wall.offset_ns(), has_device=self._has_device)
        self.timeline.learn(ran.reaches, step.seen_ns)
        if step.rank >= 0:
            ran.idle_ns = self._bubbles.before(ran)
        if self.counted is not None:
            self.counted.drops(step.dropped)
            self.counted.ran(ran)
        if join is not None and step.rank >= 0 and step.parent_span_id:
            return join(ran)
        self._tell_outer(ran)
        taken = self._keeping.take(ran)
        if not taken:
            return []
        return Unmade(
            lambda: [span for each, reason in taken for span in self._spans(each, reason)],
            gives_way=sum(len(each.step.stages) + 1 for each, _ in taken),
        )

    def _complete(self, step: Step) -> None:
        """Say of a step what is true of all of its rank."""
        place = self.hello.places.get(step.rank)
        if place is not None:
            own = step.attributes
            msgspec.structs.force_setattr(step, "attributes", {**place, **own} if own else place)

    def kept(self, ran: Ran, reason: str, of_engine: dict[str, Any] | None = None) -> Sequence[ReadableSpan]:
        """The spans of a step that is kept for this reason, and what its engine says of it; they are made later."""
        return Unmade(lambda: self._spans(ran, reason, of_engine), gives_way=len(ran.step.stages) + 1)

    def _spans(self, ran: Ran, reason: str, of_engine: dict[str, Any] | None = None) -> list[ReadableSpan]:
        spans = self._made(ran, reason, of_engine)
        if self.counted is not None:
            self.counted.kept(ran, spans, reason)
        return spans

    def _made(self, ran: Ran, reason: str, of_engine: dict[str, Any] | None) -> list[ReadableSpan]:
        step, unix_ns, why = ran.step, ran.unix_ns, {semconv.SAMPLED_REASON: reason}
        trace_id, own, around = step.trace_id, step.span_id, step.parent_span_id
        links = self.spans.links(step.links)
        if step.bare:
            # The first stage has the step's id: what a step inside it has as its parent.
            return self.spans.stages(ran, outer=why).within(trace_id, around, unix_ns, first=own, links=links)
        spans = self.spans.stages(ran).within(trace_id, own, unix_ns)
        spans.append(
            self.spans.span(
                _step_name(step),
                (trace_id, own, around),
                {**why, **_step_attributes(ran, self.take_drops()), **(of_engine or {})},
                (ran.start_ns + unix_ns, ran.end_ns + unix_ns),
                own_attributes=step.attributes,
                error=step.error,
                links=links,
            )
        )
        return spans

    def _place(self, ran: Ran, inside: tuple[int, int] | None = None) -> Placed:
        """Where a step lies, what is inside it included: that has come before it."""
        step = ran.step
        placed = self.timeline.place(step, ran.reaches)
        start_ns = min([place.start_ns for place in placed], default=step.opened_ns)
        end_ns = max([place.end_ns for place in placed], default=step.closed_ns)
        if inside is not None:
            start_ns, end_ns = min(start_ns, inside[0]), max(end_ns, inside[1])
        return placed, start_ns, end_ns

    def _tell_outer(self, ran: Ran) -> None:
        """The step around this one reaches as far; a rank's step is in no other of its process."""
        outer = ran.step.parent_span_id
        if outer and ran.step.rank < 0:
            beside = self._inside.get(outer, (ran.start_ns, ran.end_ns))
            self._inside[outer] = min(ran.start_ns, beside[0]), max(ran.end_ns, beside[1])
            if len(self._inside) > _MAX_OUTER:  # most parents are the program's own spans
                del self._inside[next(iter(self._inside))]

    def unfinished(self, frame: Unfinished) -> ReadableSpan:
        """The span of a stage that hangs: it ends now, and says that it is not over. Its step is kept if it ends."""
        if not frame.engine_span_id:
            self._keeping.expect(frame.span_id, semconv.HANG)
        unix_ns = self._wall.offset_ns()
        seconds = semconv.seconds(frame.now_ns - frame.entered_ns)
        attributes: dict[str, Any] = {
            semconv.STAGE_NAME: frame.name,
            semconv.STEP_NUMBER: frame.step_number,
            semconv.STEP_KIND: frame.step_kind,
            semconv.DEVICE_INDEX: frame.device_index,
            semconv.UNFINISHED_FOR: seconds,
            semconv.TIMING: semconv.TIMING_HOST,
        }
        return self.spans.span(
            semconv.UNFINISHED_STAGE,
            (frame.trace_id, new_bytes(8), frame.parent_span_id),
            attributes,
            (frame.entered_ns + unix_ns, frame.now_ns + unix_ns),
            error="unfinished",
            message=f"stage {frame.name!r} has been unfinished for {seconds:.1f} s",
        )


def _step_name(step: Step) -> str:
    """The name of a step's span: with the rank where there are several, which else would be told apart by nothing."""
    several = step.attributes is not None and step.attributes.get(semconv.STEP_RANKS, 1) != 1
    return f"{semconv.WORKER_STEP} rank {step.rank}" if several else semconv.WORKER_STEP


def _step_attributes(ran: Ran, dropped: dict[str, int]) -> dict[str, Any]:
    step = ran.step
    attributes: dict[str, Any] = {
        semconv.STEP_NUMBER: step.number,
        semconv.STEP_STAGES: len(step.stages),
        semconv.TIMING: (
            semconv.TIMING_DEVICE if any(stage.device_ns is not None for stage in step.stages) else semconv.TIMING_HOST
        ),
    }
    if step.kind:
        attributes[semconv.STEP_KIND] = step.kind
    if step.rank >= 0:
        attributes[semconv.RANK] = step.rank
    if ran.idle_ns is not None:
        attributes[semconv.STEP_IDLE] = semconv.seconds(ran.idle_ns)
    bound = launch_bound(ran)
    if bound is not None:
        attributes[semconv.STEP_LAUNCH_BOUND] = bound
    for reason, count in dropped.items():
        attributes[semconv.DROPPED_PREFIX + reason] = count
    return attributes
