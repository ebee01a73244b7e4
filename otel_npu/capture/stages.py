"""The hot path: what happens in the model's thread when a stage or a step begins and ends.

A stage costs two event records and as little besides as Python allows: no lock, no encoding, one look-up of the
current stream. What happens seldom stands in methods that the hot path calls out to.
"""

from __future__ import annotations

import copy
import threading
import weakref
from collections import deque
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

from otel_npu import semconv
from otel_npu.capture import context
from otel_npu.capture.decorate import decorate

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

    from otel_npu.capture.recorder import Recorder
    from otel_npu.devices.pair import Pair, Pool

_F = TypeVar("_F", bound="Callable[..., Any]")

MAX_STAGES: Final = 1000  # of one step: its frame has to fit into a packet
MAX_DEPTH: Final = 16  # of steps inside steps
MAX_PENDING: Final = 1000  # steps of one thread that the device has not finished

_NOT_ENTERED: Final = -1


class ThreadState:
    """What one thread is doing: its open step and stage, its stream, and its steps that wait to be resolved."""

    __slots__ = (
        "boundaries",
        "capturing",
        "current_stream",
        "innermost",
        "lock",
        "pending",
        "pool",
        "recorder",
        "side_stream",
        "step",
        "stream",
        "thread",
    )

    pool: Pool

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.thread = weakref.ref(threading.current_thread())
        self.step: Step | None = None
        self.innermost: Stage | None = None
        self.pending: deque[Step] = deque()
        self.lock = threading.Lock()
        """Held while this thread's pending steps are resolved, by whichever thread does it."""
        self.boundaries = 0
        """Counts closed steps: while it moves, the idle thread leaves the resolving to this one."""
        self.use_device()
        recorder.adopt(self)

    def use_device(self) -> None:
        """Begin anew with the recorder's device, which may have become known only now."""
        self.current_stream: Callable[[], Any] = self.recorder.device.current_stream
        self.capturing: Callable[[], bool] = self.recorder.device.capturing
        self.stream: Any = None
        self.side_stream = False

    def change_stream(self, stream: Any) -> None:
        """The thread has gone to another stream, and perhaps to another device."""
        self.stream = stream
        # torch refuses to capture the default stream, so only side streams have to be asked.
        self.side_stream = stream.stream_id != 0
        self.pool = self.recorder.pool(stream.device_index)
        if self.step is not None and self.step.stages:
            self.step.one_stream = False

    def another_pair(self) -> Pair | None:
        """An event pair although none is free, or None, counted, when there may be no more."""
        pair = self.pool.grow()
        if pair is None:
            self.recorder.drops.add(semconv.POOL_EXHAUSTED)
        return pair


class Stage:
    """One use of a stage: entered once, exited once, then resolved. As a decorator it makes a new one each call.

    Attributes:
        entered_ns: Host time just before the start event was recorded.
        exited_ns: Host time just before the end event was recorded; 0 while the stage is open.
        device_ns: Start on the device's own clock, or None where only the host timed it.
        duration_ns: Duration on the same clock; None until the stage is resolved.
    """

    __slots__ = (
        "_shadowed",
        "attributes",
        "device_ns",
        "duration_ns",
        "entered_ns",
        "error",
        "exited_ns",
        "index",
        "name",
        "pair",
        "parent",
        "pool",
        "recorder",
        "state",
        "step",
        "stream",
    )

    _shadowed: tuple[Step, Any] | None
    entered_ns: int
    error: type[BaseException] | None
    index: int
    pair: Pair | None
    parent: Stage | None
    pool: Pool
    state: ThreadState
    step: Step | None
    stream: Any

    def __init__(self, recorder: Recorder, name: str, attributes: dict[str, Any]) -> None:
        self.recorder = recorder
        self.name = name
        self.attributes = attributes
        self.exited_ns = _NOT_ENTERED
        self.device_ns: int | None = None
        self.duration_ns: int | None = None

    def __enter__(self) -> None:
        if self.exited_ns != _NOT_ENTERED and not self._enter_again():
            return
        state: ThreadState = self.recorder.local.state
        step = state.step
        if step is None:
            step = Step(self.recorder, self.name, bare=True)
            step.open_in(state)
        stream = state.current_stream()
        if stream != state.stream:
            state.change_stream(stream)
        stages = step.stages
        if (state.side_stream and state.capturing()) or len(stages) >= MAX_STAGES:
            self._leave_out(state, step)
            return
        self.state = state
        self.step = step
        self.stream = stream
        self.pool = pool = state.pool
        self.parent = state.innermost
        self.exited_ns = 0
        try:
            self.pair = pair = pool.free.pop()
        except IndexError:
            self.pair = pair = state.another_pair()
        state.innermost = self
        self.entered_ns = perf_counter_ns()
        stages.append(self)
        if pair is not None:
            try:
                pair.record_start(stream)
            except BaseException:
                self.recorder.stop_for_the_models_error()
                raise

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        step = self.step
        if step is None:
            self._exit_left_out()
            return
        self.exited_ns = perf_counter_ns()
        if self.pair is not None:
            try:
                self.pair.record_end(self.stream)
            except BaseException:
                self.recorder.stop_for_the_models_error()
                raise
            step.last = self
        self.error = kind
        state = self.state
        if state.innermost is self:
            outer = self.parent
            while outer is not None and outer.exited_ns:  # tasks of one thread need not end in order
                outer = outer.parent
            state.innermost = outer
        if step.bare and state.innermost is None:
            step.close()

    def __call__(self, function: _F) -> _F:
        recorder, name, attributes = self.recorder, self.name, self.attributes
        return decorate(function, lambda: Stage(recorder, name, attributes))

    def wait(self) -> int:
        """Wait until the device has finished this stage, which has been left; its duration in nanoseconds."""
        if self.exited_ns == _NOT_ENTERED:
            return 0  # it was left out
        with self.state.lock:
            pair = self.pair
            if pair is not None:
                pair.end.synchronize()
                try:
                    self.duration_ns = self.pool.device.read(self.pool.device_index, [pair])[0][1]
                except (OSError, RuntimeError):
                    self.recorder.drops.add(semconv.TIMES_UNREADABLE)
        return self.exited_ns - self.entered_ns if self.duration_ns is None else self.duration_ns

    def _leave_out(self, state: ThreadState, step: Step) -> None:
        full = len(step.stages) >= MAX_STAGES
        self.recorder.drops.add(semconv.STEP_TOO_LARGE if full else semconv.STREAM_CAPTURED)
        self.step = None
        if step.bare and not step.stages:
            state.step = None

    def _enter_again(self) -> bool:
        """Make room for another use of the same object; False if the one before is still open."""
        if not self.exited_ns:
            self.recorder.drops.add(semconv.REENTERED)
            self._shadowed = (cast("Step", self.step), getattr(self, "_shadowed", None))
            self.step = None
            return False
        with self.state.lock:  # the step of the use before may be about to be resolved
            stages = self.step.stages if self.step is not None else []
            if self in stages:
                stages[stages.index(self)] = copy.copy(self)
        self.device_ns = self.duration_ns = None
        return True

    def _exit_left_out(self) -> None:
        shadowed = getattr(self, "_shadowed", None)
        if shadowed is not None:
            self.step, self._shadowed = shadowed


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
        "outer_stage",
        "recorder",
        "requests",
        "stages",
        "state",
    )

    state: ThreadState
    outer: Step | None
    outer_stage: Stage | None
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
        self.open_in(self.recorder.local.state)
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
        self.outer_stage = state.innermost
        state.innermost = None
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
            if state.innermost is not None:
                self.one_stream = False  # a stage is still open: look at every one
            state.step = self.outer
            state.innermost = self.outer_stage
        self.recorder.step_closed(state, self)

    def ready(self) -> bool:
        """Whether every stage has ended, on the host and on the device: one query a stream."""
        if self.one_stream:
            last = self.last
            return last is None or last.pair is None or bool(last.pair.end.query())
        ends: dict[Any, Stage] = {}
        for stage in self.stages:
            if not stage.exited_ns:
                return False
            if stage.pair is not None:
                end = ends.setdefault(stage.stream, stage)
                if stage.exited_ns >= end.exited_ns:
                    ends[stage.stream] = stage
        return all(stage.pair is None or stage.pair.end.query() for stage in ends.values())

    def __enter__(self) -> None:
        self.open()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(kind)

