"""Which steps of a program without an engine become traces: those chosen when they began, and those that stand out."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final

from otel_npu import semconv

if TYPE_CHECKING:
    from otel_npu.relay.placing import Ran
    from otel_npu.slow import SlowSteps
    from otel_npu.wire.frames import Step

HELD_NS: Final = 2_000_000_000
HELD_STAGES: Final = 4096
_MAX_EXPECTED: Final = 256
_MAX_PLACES: Final = 256


class Keeping:
    """Judges the steps of one process, in the order in which they come.

    A step inside another comes before it. So what is inside is held for a while: if the outer one is kept, its trace
    is to be whole; and what is kept inside keeps what is around it.

    Args:
        slow: Says which steps are slow.
    """

    def __init__(self, slow: SlowSteps) -> None:
        self._slow = slow
        self._ends_ns: dict[tuple[int, bytes], int] = {}
        """Where the last step ended, by its device and what is around it."""
        self._expected: dict[bytes, str] = {}
        """Steps still to come that are kept, by span id, and why."""
        self._held: deque[Ran] = deque()
        self._held_stages = 0

    def expect(self, span_id: bytes, reason: str) -> None:
        """Keep this step when it comes."""
        if span_id:
            self._expected.setdefault(span_id, reason)
            if len(self._expected) > _MAX_EXPECTED:
                del self._expected[next(iter(self._expected))]

    def take(self, ran: Ran) -> list[tuple[Ran, str]]:
        """What is to be a trace now that this step has come, and why each is."""
        step = ran.step
        expected = self._expected.pop(step.span_id, "")
        slow = self._slow.judge(_kind(step), self._added_ns(ran), kept=step.kept or bool(expected))
        if not step.trace_id:
            return []
        if step.kept:
            return [(ran, semconv.RATE)]
        reason = expected or (semconv.ERROR if step.error is not None else semconv.SLOW if slow else "")
        if not reason:
            if step.parent_span_id:
                self._hold(ran)
            return []
        self.expect(step.parent_span_id, reason)
        return [*((inner, reason) for inner in self._inside(step.span_id)), (ran, reason)]

    def _added_ns(self, ran: Ran) -> int:
        """How long the step took, without what it waited for the one before it."""
        stages = ran.step.stages
        place = stages[0].device_index if stages else -1, ran.step.parent_span_id
        before_ns = self._ends_ns.pop(place, 0)
        self._ends_ns[place] = max(before_ns, ran.end_ns)
        if len(self._ends_ns) > _MAX_PLACES:
            del self._ends_ns[next(iter(self._ends_ns))]
        return ran.end_ns - max(ran.start_ns, min(before_ns, ran.end_ns))

    def _hold(self, ran: Ran) -> None:
        held = self._held
        held.append(ran)
        self._held_stages += len(ran.step.stages)
        while self._held_stages > HELD_STAGES or ran.step.seen_ns - held[0].step.seen_ns > HELD_NS:
            self._held_stages -= len(held.popleft().step.stages)
            if not held:
                break

    def _inside(self, span_id: bytes) -> list[Ran]:
        """What is held of the steps inside this one; it is held no longer."""
        found: list[Ran] = []
        around = {span_id}
        for ran in reversed(self._held):  # an outer step stands behind what is inside it
            if ran.step.parent_span_id in around:
                around.add(ran.step.span_id)
                found.append(ran)
        for ran in found:
            self._held.remove(ran)
            self._held_stages -= len(ran.step.stages)
        return found[::-1]


def _kind(step: Step) -> tuple[str, str]:
    return step.kind, step.stages[0].name if step.bare and step.stages else ""
