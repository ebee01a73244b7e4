"""Steps: opened and closed on a thread of the model's, with nothing between the two but the stages inside."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from otel_npu import semconv
from otel_npu.capture import context
from otel_npu.capture.context import open_step
from otel_npu.capture.plain import NOT_OPENED
from otel_npu.capture.records import StepRecord, abandoned
from otel_npu.interrupts import from_outside

if TYPE_CHECKING:
    from otel_npu.capture.shared import Capture

MAX_DEPTH: Final = 16  # of steps inside steps


class Step(StepRecord):
    """A step: a context manager, or `open()` and `close()`. The stages inside belong to it."""

    __slots__ = ()

    capture: Capture
    outer: Step | None

    def _open_again(self) -> None:
        self.capture.drops.add(semconv.REENTERED)

    def _find_place(self) -> bool:
        """The step around this one, now that there may be one, and the device; False if this one is left out."""
        if self.outer is not None:
            self.outer = outer = enclosing(self.outer, self.capture)
            if outer is not None and _depth(outer) >= MAX_DEPTH:
                self.capture.drops.add(semconv.STEP_TOO_DEEP)
                return False
        if self.capture.device_is_open_question:
            self.capture.settle_device()
        return True

    def _choose(self) -> context.Ids | None:
        """Ids for it, and whether it is kept as a trace; None for one that never is: only its times count."""
        outer, capture = self.outer, self.capture
        if outer is not None:
            around = outer.ids
            if around is None or not around.trace_id:
                return None
            return context.child_of(around.trace_id, around.span_id, kept=around.kept)
        active = context.active_span()
        if active is not None:
            if not active.trace_flags & context.SAMPLED:
                return None
            ids = active.trace_id.to_bytes(16, "big"), active.span_id.to_bytes(8, "big")
            return context.child_of(*ids, kept=capture.limiter.allow(self.kind))
        return context.new_root(kept=capture.limiter.allow(self.kind)) if capture.root_traces else None

    def _not_opened(self, error: BaseException) -> bool:
        """It does not begin. Whether the error is the program's, and goes on."""
        self.undo()
        if from_outside(error):
            self.capture.drops.add(semconv.INTERRUPTED)
            return True
        self.capture.count_fault(error)
        return False

    def let_go(self) -> None:
        """Nobody can close it any more: a signal handler raised while it was left, or it was forgotten."""
        self.capture.drops.add(semconv.INTERRUPTED)
        self.close()

    def undo(self) -> None:
        """It does not begin after all."""
        if open_step.get() is self:
            open_step.set(self.outer)
        if self.closed_ns == 0:
            self.thread.open.pop(id(self), None)
        self.closed_ns = NOT_OPENED


def enclosing(step: Step, capture: Capture) -> Step | None:
    """The innermost step from this one outwards that is still open, and not of tracing that has ended since."""
    found: Step | None = step
    while found is not None:
        if found.bare and found.closed_ns == 0 and found.stages and abandoned(found.stages, 0):
            found.close()
        if not found.closed_ns and found.capture is capture:
            break
        found = found.outer
    return found


def _depth(step: Step) -> int:
    """How many steps lie round this one and are open, itself included. What lies between them is forgotten."""
    depth = 0
    at: Step | None = step
    while at is not None:
        if at.outer is not None:
            at.outer = enclosing(at.outer, at.capture)
        at = at.outer
        depth += 1
    return depth
