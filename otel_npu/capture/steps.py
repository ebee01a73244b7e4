"""Steps: opened and closed on a thread of the model's, with nothing between the two but the stages inside."""

from __future__ import annotations

from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, Final

from otel_npu import semconv
from otel_npu.capture import context
from otel_npu.capture.context import open_step
from otel_npu.capture.records import NO_RANK, StepRecord, abandoned

if TYPE_CHECKING:
    from types import TracebackType

    from otel_npu.capture.records import Rank
    from otel_npu.capture.shared import Capture, Thread

MAX_DEPTH: Final = 16  # of steps inside steps

_NOT_ENTERED: Final = -1


class Step(StepRecord):
    """A step: a context manager, or `open()` and `close()`. The stages inside belong to it."""

    __slots__ = ("outer", "thread")

    capture: Capture
    outer: Step | None
    thread: Thread

    def __init__(
        self,
        capture: Capture,
        kind: str,
        requests: tuple[Any, ...] = (),
        attributes: dict[str, Any] | None = None,
        *,
        bare: bool = False,
        ids: context.Ids | None = None,
        rank: Rank = NO_RANK,
        number: int = 0,
    ) -> None:
        self.capture = capture
        self.kind = kind
        self.requests = requests
        self.attributes = attributes
        self.bare = bare
        # Given with the step, or else chosen when it opens. Without a trace id it is no trace; by its parent it may be
        # part of an engine's step all the same.
        self.ids = ids
        self.rank = rank
        self.number = number  # an engine's, so that it is the same on every rank; else of this process
        self.stages = []
        self.closed_ns = _NOT_ENTERED
        self.error = None
        self.hang_reported = False

    def open(self) -> Step:
        """Begin the step on the calling thread."""
        if self.closed_ns != _NOT_ENTERED:
            self.capture.drops.add(semconv.REENTERED)
            return self
        try:
            self._open()
        except BaseException:
            self.undo()
            self.capture.own_fault()
        return self

    def _open(self) -> None:
        capture = self.capture
        self.outer = outer = open_step.get()
        if outer is not None:
            self.outer = outer = enclosing(outer, capture)
            if outer is not None and _depth(outer) >= MAX_DEPTH:
                capture.drops.add(semconv.STEP_TOO_DEEP)
                return
        if capture.device_is_open_question:
            capture.settle_device()
        self.thread = thread = capture.local.thread
        if not self.number:
            self.number = next(capture.step_numbers)
        if self.ids is None:
            self.ids = _choose(self)
        self.opened_ns = perf_counter_ns()
        self.closed_ns = 0
        thread.open[id(self)] = self
        open_step.set(self)

    def close(self, error: type[BaseException] | None = None) -> None:
        """End the step: it waits for the device now. `error` is the type of what went wrong in it."""
        if self.closed_ns != 0:
            return
        thread = self.thread
        self.error = error
        # If a signal handler raises from here on, the idle thread finds a closed step among the open ones.
        self.closed_ns = closed_ns = perf_counter_ns()
        if open_step.get() is self:
            open_step.set(self.outer)
        thread.pending.append(self)
        thread.open.pop(id(self), None)
        self.capture.step_closed(thread, closed_ns)

    def undo(self) -> None:
        """It does not begin after all."""
        if open_step.get() is self:
            open_step.set(self.outer)
        if self.closed_ns == 0:
            self.thread.open.pop(id(self), None)
        self.closed_ns = _NOT_ENTERED


class Handle:
    """A step in the program's hands. Let go while it is open, because a signal handler raised, it is closed."""

    __slots__ = ("_step",)

    def __init__(self, step: Step) -> None:
        self._step = step

    def open(self) -> Handle:
        """Begin the step on the calling thread."""
        self._step.open()
        return self

    def close(self, error: type[BaseException] | None = None) -> None:
        """End the step. `error` is the type of what went wrong in it."""
        self._step.close(error)

    def __enter__(self) -> None:
        self._step.open()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._step.close(kind)

    def __del__(self) -> None:
        if self._step.closed_ns == 0:
            self._step.capture.drops.add(semconv.INTERRUPTED)
            self._step.close()


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


def _choose(step: Step) -> context.Ids | None:
    """Ids for a step, and whether it is kept as a trace; None for one that never is: only its times count."""
    outer, capture = step.outer, step.capture
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
        return context.child_of(*ids, kept=capture.limiter.allow(step.kind))
    return context.new_root(kept=capture.limiter.allow(step.kind)) if capture.settings.root_traces else None
