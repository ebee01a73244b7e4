"""The hot path: what happens in the model's thread when a stage or a step begins and ends.

A stage costs two event records and as little besides as Python allows: no lock, no encoding, one look-up of the
current stream. What happens seldom stands in methods that the hot path calls out to.
"""

from __future__ import annotations

import copy
import functools
import threading
import weakref
from collections import deque
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

from otel_npu import semconv
from otel_npu.capture.decorate import decorate

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

    from otel_npu.capture import context
    from otel_npu.capture.recorder import Local, Recorder
    from otel_npu.devices.pair import Pair, Pool

_F = TypeVar("_F", bound="Callable[..., Any]")

MAX_STAGES: Final = 1024  # of one step: its frame has to fit into a packet. Not below any device's pool
MAX_DEPTH: Final = 16  # of steps inside steps
MAX_PENDING: Final = 1000  # steps of one thread that the device has not finished

_NOT_ENTERED: Final = -1


class ThreadState:
    """What one thread is doing: its open step, its stream, and its steps that wait to be resolved."""

    __slots__ = (
        "boundaries",
        "capturing",
        "current_stream_key",
        "free",
        "lock",
        "pending",
        "pool",
        "recorder",
        "side_stream",
        "step",
        "stream",
        "stream_key",
        "thread",
    )

    pool: Pool
    stream: Any

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.thread = weakref.ref(threading.current_thread())
        self.step: Step | None = None
        self.pending: deque[Step] = deque()
        self.lock = threading.Lock()
        """Held while this thread's pending steps are resolved, by whichever thread does it."""
        self.boundaries = 0
        """Counts closed steps: while it moves, the idle thread leaves the resolving to this one."""
        recorder.adopt(self)  # first: a device that becomes known meanwhile must not be missed
        self.use_device()

    def use_device(self) -> None:
        """Begin anew with the recorder's device, which may have become known only now."""
        self.current_stream_key: Callable[[], Any] = self.recorder.device.current_stream_key
        self.capturing: Callable[[], bool] = self.recorder.device.capturing
        self.stream_key: Any = None
        self.side_stream = False
        self.free: list[Pair] = []

    def change_stream(self, key: Any) -> None:
        """The thread has gone to another stream, and perhaps to another device."""
        self.stream_key = key
        self.stream = stream = self.recorder.device.current_stream()
        # torch refuses to capture the default stream, so only side streams have to be asked.
        self.side_stream = stream.stream_id != 0
        self.pool = self.recorder.pool(stream.device_index)
        self.free = self.pool.free
        step = self.step
        while step is not None:  # on the way back to the step around, nothing tells that the stream has changed
            if step.stages:
                step.one_stream = False
            step = step.outer

    def another_pair(self) -> Pair | None:
        """An event pair although none is free, or None, counted, when there may be no more."""
        pair = self.pool.grow()
        if pair is None:
            self.recorder.drops.add(semconv.POOL_EXHAUSTED)
        return pair

    def take_out(self, closed: Step) -> None:
        """Forget a step that is closed before those that were opened inside it."""
        inside: list[Step] = []
        step = self.step
        while step is not None and step is not closed:
            inside.append(step)
            step = step.outer
        if step is closed and inside:
            inside[-1].outer = closed.outer
            for step in inside:
                step.depth -= 1


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
        self.exited_ns = perf_counter_ns()
        self.error = kind
        pair = self.pair
        if pair is not None:
            try:
                pair.record_end(self.stream)
            except BaseException:
                self._end_failed(step)
                raise
            step.last = self
        if step.bare and step.stages[0] is self:
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
        if step.bare and step.stages[0] is self:
            step.close()


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


class Step:
    """A step of one thread: a context manager, or `open()` and `close()`. The stages inside belong to it."""

    __slots__ = (
        "attributes",
        "bare",
        "closed_ns",
        "depth",
        "error",
        "hang_reported",
        "ids",
        "kind",
        "last",
        "number",
        "one_stream",
        "opened_ns",
        "outer",
        "recorder",
        "requests",
        "stages",
        "state",
    )

    state: ThreadState
    outer: Step | None
    depth: int
    ids: context.Ids | None
    opened_ns: int
    number: int

    def __init__(
        self,
        recorder: Recorder,
        kind: str,
        requests: Sequence[Any] = (),
        attributes: dict[str, Any] | None = None,
        *,
        bare: bool = False,
    ) -> None:
        self.recorder = recorder
        self.kind = kind
        self.requests = requests
        self.attributes = attributes
        self.bare = bare
        """A stage that runs in no step is a step of its own, without a step span."""
        self.stages: list[Stage] = []
        self.last: Stage | None = None
        """The stage with events that ended last: with one stream, when its end is done everything is."""
        self.one_stream = True
        self.closed_ns = _NOT_ENTERED
        self.error: type[BaseException] | None = None
        self.hang_reported = False

    def open(self) -> Step:
        """Begin the step on the calling thread."""
        if self.closed_ns != _NOT_ENTERED:
            self.recorder.drops.add(semconv.REENTERED)
            return self
        try:
            self.open_in(self.recorder.local.state)
        except Exception:
            self.recorder.own_fault()
            self.closed_ns = _NOT_ENTERED
        return self

    def open_in(self, state: ThreadState) -> None:
        """Begin the step in this thread's state."""
        self.state = state
        recorder = self.recorder
        self.outer = outer = state.step
        self.depth = 0 if outer is None else outer.depth + 1
        if self.depth >= MAX_DEPTH:
            recorder.drops.add(semconv.STEP_TOO_DEEP)
            return
        self.closed_ns = 0
        if recorder.device_is_open_question:
            recorder.settle_device()
        self.number = next(recorder.step_numbers)
        self.ids = recorder.choose(self)
        self.opened_ns = perf_counter_ns()
        state.step = self

    def close(self, error: type[BaseException] | None = None) -> None:
        """End the step: it waits for the device now. `error` is the type of what went wrong in it."""
        if self.closed_ns != 0:
            return
        self.closed_ns = perf_counter_ns()
        self.error = error
        state = self.state
        if state.step is self:
            state.step = self.outer
        else:
            state.take_out(self)
        self.recorder.step_closed(state, self)

    def ready(self) -> bool:
        """Whether every stage has ended, on the host and on the device: one query a stream."""
        for stage in self.stages:
            if not stage.exited_ns:
                return False
        if self.one_stream:
            last = self.last
            return last is None or last.pair is None or bool(last.pair.end.query())
        ends: dict[tuple[int, int], Pair] = {}
        for stage in sorted(self.stages, key=lambda stage: stage.exited_ns):
            if stage.pair is not None:
                ends[stage.stream.device_index, stage.stream.stream_id] = stage.pair
        return all(pair.end.query() for pair in ends.values())

    def __enter__(self) -> None:
        self.open()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(kind)
