"""What happens seldom when a stage begins and ends: the hot path itself is `plain.py`, or the extension module."""

from __future__ import annotations

from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, TypeVar, cast

from otel_npu import semconv
from otel_npu.capture.context import open_step
from otel_npu.capture.decorate import again, decorate
from otel_npu.capture.records import STAGE_FIELDS, StageRecord, new_step
from otel_npu.capture.steps import Step, enclosing
from otel_npu.interrupts import from_outside
from otel_npu.wire.frames import MAX_STAGES

if TYPE_CHECKING:
    from collections.abc import Callable

    from otel_npu.capture.shared import Capture
    from otel_npu.devices.device import Pair, Stream

_F = TypeVar("_F", bound="Callable[..., Any]")


class Stage(StageRecord):
    """One use of a stage: entered once, exited once, then resolved. As a decorator it makes a new one each call."""

    __slots__ = ()

    capture: Capture
    step: Step | None

    def __call__(self, function: _F) -> _F:
        """Decorate a function, a coroutine function, or a generator function of either kind."""
        return decorate(function, self.name, self.attributes)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy is a stage like any other of this name; what this one has measured is its own."""
        return again, (self.name, self.attributes)

    def wait(self) -> int:
        """Wait until the device has finished this stage, which has been left; its duration in nanoseconds."""
        step = self.step
        if step is None:
            return 0  # it was left out
        pair = self.pair
        if pair is not None:
            pair.end.synchronize()  # without the lock: if it hangs, the hang watch has to get at it
        with step.thread.lock:
            pair = self.pair  # it may have been resolved meanwhile
            if pair is not None:
                self._read_alone(step, pair)
        duration_ns = self.duration_ns
        return self.exited_ns - self.entered_ns if duration_ns is None else duration_ns

    def _read_alone(self, step: Step, pair: Pair) -> None:
        """Read this stage before its step is resolved. Once: to read may move the event that times count from."""
        pool = pair.pool
        try:
            ((device_ns, self.duration_ns),) = pool.device.read(pool.device_index, [pair])
            self.device_ns = None if pool.device.host_clock else device_ns
        except (OSError, RuntimeError):
            step.capture.drops.add(semconv.TIMES_UNREADABLE)
        self.pair = None
        pool.free.append(pair)

    def _step(self, around: Step | None) -> Step | None:
        """The step that is open here; where there is none, a stage with work on the device is a step of its own."""
        step = None if around is None else enclosing(around, self.capture)
        if step is None and not self.host:
            step = new_step(Step, self.capture, self.name, (), None)
            step.bare = True
            step.open()
        return step

    def _too_many(self) -> None:
        raise _LeftOutError(semconv.STEP_TOO_LARGE)

    def _capture_check(self) -> None:
        """The current stream may be captured into a graph: then nothing can be measured on it."""
        if self.capture.device.capturing():
            raise _LeftOutError(semconv.STREAM_CAPTURED)

    def _another_pair(self, step: Step, stream: Stream) -> Pair | None:
        """An event pair although none is free, or None, counted, when there may be no more."""
        if len(step.stages) >= MAX_STAGES:
            raise _LeftOutError(semconv.STEP_TOO_LARGE)
        pair = stream.pool.grow()
        if pair is None:
            self.capture.drops.add(semconv.POOL_EXHAUSTED)
        return pair

    def _not_entered(self, pair: Pair | None, error: BaseException) -> bool:
        """The entry failed: this use is left out. Whether the error is the program's, and goes on."""
        capture = self.capture
        outside = from_outside(error)
        recorded = pair if self.step is not None and not outside else None
        step = self.step or open_step.get()
        self.step = self.pair = None
        if step is not None:
            if self in step.stages:
                step.stages.remove(self)
            if step.bare and not step.stages:
                step.undo()
        if recorded is None and pair is not None:
            pair.pool.free.append(pair)
        if outside:
            capture.drops.add(semconv.INTERRUPTED)
            return True
        if isinstance(error, _LeftOutError):
            capture.drops.add(error.reason)
        elif recorded is None:
            capture.count_fault(error)
        elif _made(recorded, recorded.start):
            capture.stop_for_the_models_error()
            return True
        else:
            _refused(capture, recorded)
        _LeftOut(self)
        return False

    def _not_exited(self, step: Step, exited_ns: int, error: BaseException) -> bool:
        """The exit failed: the stage has host times alone. Whether the error is the program's, and goes on."""
        capture = step.capture
        pair, self.pair = self.pair, None
        self.exited_ns = exited_ns or perf_counter_ns()
        goes_on = True
        if from_outside(error):
            capture.drops.add(semconv.INTERRUPTED)
            if pair is not None:
                pair.pool.free.append(pair)
        elif pair is not None and not _made(pair, pair.end):
            goes_on = False
            _refused(capture, pair)
        else:
            capture.drops.add(semconv.TIMES_UNREADABLE)
            capture.stop_for_the_models_error()
        if step.bare and step.stages and step.stages[0] is self:
            step.close()
        return goes_on

    def _enter_again(self) -> bool:
        """Make room for another use of the same object; False if the one before is still open."""
        step = self.step
        if isinstance(step, _LeftOut):
            self.capture.drops.add(semconv.REENTERED)
            step.entered += 1
            return False
        if not self.exited_ns:
            self.capture.drops.add(semconv.REENTERED)
            _LeftOut(self)
            return False
        assert step is not None
        with step.thread.lock:  # the step of the use before may be about to be resolved
            if self in step.stages:
                step.stages[step.stages.index(self)] = self._record()
        self.step = self.pair = self.device_ns = self.duration_ns = None
        return True

    def _record(self) -> StageRecord:
        """What this use leaves behind, when the object is used again."""
        record = StageRecord()
        for field in STAGE_FIELDS:
            if hasattr(self, field):
                setattr(record, field, getattr(self, field))
        return record


class _LeftOutError(Exception):
    """This use of a stage is left out."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


class _LeftOut:
    """Stands in the place of a stage's step while an entry of it is left out: the exit that belongs to it ends here.

    So that the hot path need not ask: to a stage's exit it looks like a step with this one stage.
    """

    __slots__ = ("_pair", "_step", "bare", "entered", "stages")

    def __init__(self, stage: Stage) -> None:
        self.bare = True
        self.stages = [stage]
        self.entered = 1
        self._step, self._pair = stage.step, stage.pair
        stage.step, stage.pair = cast("Step", self), None

    def close(self) -> None:
        """One of the entries that were left out has been left; with the last the stage is what it was."""
        stage = self.stages[0]
        stage.exited_ns = 0
        self.entered -= 1
        if not self.entered:
            stage.step, stage.pair = self._step, self._pair
            self.stages = []  # it and the stage refer to each other


def _made(pair: Pair, event: Any) -> bool:
    """Whether an event exists whose record has failed."""
    try:
        return pair.pool.device.made(event)
    except Exception:  # it can't be told: then the failure may be the model's
        return True


def _refused(capture: Capture, pair: Pair) -> None:
    """The device makes no more events: that is ours alone, and what there are have to do."""
    capture.drops.add(semconv.POOL_EXHAUSTED)
    pair.pool.close()
