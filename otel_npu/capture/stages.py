"""The hot path: what happens in the model's thread when a stage begins and ends.

A stage costs two event records and as little besides as Python allows: no lock, no encoding, one look-up of the
current stream. What happens seldom stands in methods that the hot path calls out to.
"""

from __future__ import annotations

import copy
import functools
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, TypeVar, cast

from otel_npu import semconv
from otel_npu.capture.decorate import decorate
from otel_npu.capture.steps import MAX_STAGES, Step
from otel_npu.devices.cpu import HOST_STREAM

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from otel_npu.capture.recorder import Local
    from otel_npu.capture.steps import ThreadState
    from otel_npu.devices.pair import Pair

_F = TypeVar("_F", bound="Callable[..., Any]")

_new = object.__new__


class Stage:
    """One use of a stage: entered once, exited once, then resolved. As a decorator it makes a new one each call.

    Attributes:
        step: The step it belongs to; None before it is entered, and for a stage that is left out.
        pair: Its events; None where only the host times it, and once it is resolved.
        entered_ns: Host time just before the start event was recorded.
        exited_ns: Host time just before the end event was recorded; 0 while the stage is open.
        device_ns: Set when it is resolved: start on the device's own clock, None where only the host timed it.
        duration_ns: Set when it is resolved.
    """

    __slots__ = (
        "attributes",
        "device_ns",
        "duration_ns",
        "entered_ns",
        "error",
        "exited_ns",
        "local",
        "name",
        "pair",
        "step",
        "stream",
    )

    attributes: dict[str, Any]
    device_ns: int | None
    duration_ns: int | None
    entered_ns: int
    error: type[BaseException] | None
    exited_ns: int
    local: Local
    name: str
    pair: Pair | None
    step: Step | None
    stream: Any

    def __enter__(self) -> None:
        if self.step is not None and not self._enter_again():
            return
        try:
            state = self.local.state
            step = state.step
            if step is None:
                step = Step(state.recorder, self.name, bare=True)
                step.open_in(state)
            key = state.current_stream_key()
            if key != state.stream_key:
                state.change_stream(key)
            pair: Pair | None
            try:
                pair = state.free.pop()
            except IndexError:
                if len(step.stages) >= MAX_STAGES:
                    self._leave_out(state, step, None, semconv.STEP_TOO_LARGE)
                    return
                pair = state.another_pair()
            if state.side_stream and state.capturing():
                self._leave_out(state, step, pair, semconv.STREAM_CAPTURED)
                return
            self.step = step
            self.pair = pair
            self.stream = stream = state.stream
            self.exited_ns = 0
            step.stages.append(self)
            self.entered_ns = perf_counter_ns()
        except Exception:
            self._fault()
            return
        if pair is not None:
            try:
                pair.record_start(stream)
            except BaseException:
                self._start_failed(step)
                raise

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        step = self.step
        if step is None:
            return
        exited_ns = perf_counter_ns()
        self.error = kind
        pair = self.pair
        if pair is not None:
            try:
                pair.record_end(self.stream)
            except BaseException:
                self.exited_ns = exited_ns
                self._end_failed(step)
                raise
            step.last = self
        self.exited_ns = exited_ns  # last: from here on the idle thread may find the stage done
        if step.bare and step.stages and step.stages[0] is self:
            step.close()

    def __call__(self, function: _F) -> _F:
        """Decorate a function or coroutine function."""
        from otel_npu.capture import switch

        return decorate(function, functools.partial(switch.stage, self.name, **self.attributes))

    def wait(self) -> int:
        """Wait until the device has finished this stage, which has been left; its duration in nanoseconds."""
        step = self.step
        if step is None:
            return 0  # it was left out
        pair = self.pair
        if pair is not None:
            pair.end.synchronize()  # without the lock: if it hangs, the hang watch has to get at it
        with step.state.lock:
            pair = self.pair  # it may have been resolved meanwhile
            if pair is not None:
                self._read_alone(step, pair)
        duration_ns: int | None = getattr(self, "duration_ns", None)
        return self.exited_ns - self.entered_ns if duration_ns is None else duration_ns

    def _read_alone(self, step: Step, pair: Pair) -> None:
        """Read this stage before its step is resolved. Once: to read may move the event that times count from."""
        pool = pair.pool
        try:
            ((device_ns, self.duration_ns),) = pool.device.read(pool.device_index, [pair])
            self.device_ns = None if pool.device.host_clock else device_ns
        except (OSError, RuntimeError):
            step.recorder.drops.add(semconv.TIMES_UNREADABLE)
        self.pair = None
        pool.free.append(pair)

    def _leave_out(self, state: ThreadState, step: Step, pair: Pair | None, reason: str) -> None:
        state.recorder.drops.add(reason)
        if pair is not None:
            state.free.append(pair)
        if step.bare and not step.stages:
            state.step = None
        self.pair = None
        LeftOut(self)

    def _enter_again(self) -> bool:
        """Make room for another use of the same object; False if the one before is still open."""
        step = self.step
        if isinstance(step, LeftOut) or not self.exited_ns:
            self.local.state.recorder.drops.add(semconv.REENTERED)
            if isinstance(step, LeftOut):
                step.entered += 1
            else:
                LeftOut(self)
            return False
        assert step is not None
        with step.state.lock:  # the step of the use before may be about to be resolved
            if self in step.stages:
                step.stages[step.stages.index(self)] = copy.copy(self)
        self.step = self.pair = self.device_ns = self.duration_ns = None
        return True

    def _fault(self) -> None:
        """Something of ours, or of torch's look-ups, failed before anything was recorded: this use is left out."""
        state = self.local.state
        state.recorder.own_fault()
        step, self.step = state.step, None
        if step is not None:
            if self in step.stages:
                step.stages.remove(self)
            if step.bare and not step.stages:
                state.step = step.outer

    def _start_failed(self, step: Step) -> None:
        """The stage does not begin: the program's error goes out of its entry."""
        step.stages.remove(self)
        self.step = None
        step.recorder.stop_for_the_models_error()

    def _end_failed(self, step: Step) -> None:
        """The stage has host times alone, and its step must not wait for an event that was never recorded."""
        self.pair = None
        step.recorder.drops.add(semconv.TIMES_UNREADABLE)
        step.recorder.stop_for_the_models_error()
        if step.bare and step.stages and step.stages[0] is self:
            step.close()


class HostStage(Stage):
    """A stage that does no work on the device: only the host's clock times it. Left out when it is in no step."""

    __slots__ = ()

    def __enter__(self) -> None:
        if self.step is not None and not self._enter_again():
            return
        state = self.local.state
        step = state.step
        if step is None:
            return
        if len(step.stages) >= MAX_STAGES:
            self._leave_out(state, step, None, semconv.STEP_TOO_LARGE)
            return
        self.step = step
        self.pair = None
        self.stream = HOST_STREAM
        self.exited_ns = 0
        step.stages.append(self)
        self.entered_ns = perf_counter_ns()


def new_stage(of: type[Stage], local: Local, name: str, attributes: dict[str, Any]) -> Stage:
    """A stage to be entered. Not by a constructor: without one it is made in two thirds of the time."""
    stage = _new(of)
    stage.local = local
    stage.name = name
    stage.attributes = attributes
    stage.step = None
    return stage


class LeftOut:
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
