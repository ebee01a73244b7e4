"""Steps, and what a thread is doing: what the hot path of a stage works on, and all of it that happens seldom."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from otel_npu import semconv

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

    from otel_npu.capture import context
    from otel_npu.capture.recorder import Recorder
    from otel_npu.capture.stages import Stage
    from otel_npu.devices.pair import Pair, Pool

MAX_STAGES: Final = 1024  # of one step: its frame has to fit into a packet. Not below any device's pool
MAX_DEPTH: Final = 16  # of steps inside steps
MAX_PENDING: Final = 1000  # steps of one thread that the device has not finished

_NOT_ENTERED: Final = -1


class Rank(NamedTuple):
    """Which of an engine's workers a step ran on, and whether that one's output is what the engine waits for."""

    number: int
    returns_output: bool


NO_RANK: Final = Rank(-1, returns_output=False)


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
        "rank",
        "recorder",
        "requests",
        "stages",
        "state",
    )

    state: ThreadState
    outer: Step | None
    depth: int
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
        ids: context.Ids | None = None,
        rank: Rank = NO_RANK,
    ) -> None:
        self.recorder = recorder
        self.kind = kind
        self.requests = requests
        self.attributes = attributes
        self.bare = bare
        """A stage that runs in no step is a step of its own, without a step span."""
        self.ids = ids
        """Given with the step, or else chosen when it opens. Without a trace id it is no trace; by its parent it may
        be part of an engine's step all the same."""
        self.rank = rank
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
        if self.ids is None:
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
