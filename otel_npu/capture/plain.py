"""What a stage and a step *are*, how they begin and end, and how steps are packed: in Python.

`_native.c` says the same where it is built; what changes here changes there. What happens seldom is said once, by
`steps.Step` and `stages.Stage`, which derive from either.

A signal handler of the program's may raise between any two lines. So the way in and the way out are one `try` each, and
what it leaves half done is undone.
"""

from __future__ import annotations

import weakref
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, Final, TypeVar

from otel_npu.capture.context import NO_IDS, NO_RANK, open_step
from otel_npu.devices.cpu import HOST_STREAM
from otel_npu.wire.frames import MAX_STAGES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

    from typing_extensions import Self

    from otel_npu.capture.context import Ids, Limiter, Rank

NOT_OPENED: Final = -1
BATCH: Final = 256
"""So many steps and stages at most wait for each other, to be resolved and sent at once. See `benchmarks/step_cost.py`:
what is run once between two steps is cold, and costs several times as much. More than come between two looks of the
idle thread in a server whose steps take 2 ms: if both resolve by turns, each has half as much to do as often."""
BATCH_NS: Final = 250_000_000
"""When the oldest has waited for so long, the thread that closes the next does it: the idle thread, which mostly has
done it before, gets no turn."""
MAX_PENDING: Final = 1000
"""Steps of one thread that the device has not finished."""

_S = TypeVar("_S", bound="StageRecord")
_T = TypeVar("_T", bound="StepRecord")

_new = object.__new__


class CaptureRecord:
    """What a step and a stage need to know of the process that they are in.

    Attributes:
        batch: So many steps and stages wait at most until they are resolved, if their device is done.
        current_stream_key: Gives what `streams` knows the calling thread's current stream by.
        device_is_open_question: Whether it is yet to be seen on which device the program works.
        limiter: How many steps a second may begin traces.
        local: Its `thread` is the calling thread's record.
        root_traces: Whether steps in no span begin traces at all.
        running: Whether steps are resolved still.
        step_numbers: The numbers of steps to come.
        streams: Those that were seen.
    """

    __slots__ = (
        "__dict__",
        "batch",
        "current_stream_key",
        "device_is_open_question",
        "limiter",
        "local",
        "root_traces",
        "running",
        "step_numbers",
        "streams",
    )

    batch: int
    current_stream_key: Callable[[], Any]
    device_is_open_question: bool
    limiter: Limiter
    local: Any
    root_traces: bool
    running: bool
    step_numbers: Iterator[int]
    streams: dict[Any, Any]


class ThreadRecord:
    """One thread's steps.

    Attributes:
        thread: The thread, weakly.
        open: Those that are open, by identity.
        pending: Those that are closed and wait for the device, oldest first.
        waiting: How many steps and stages were closed since the last look at them.
        waiting_since_ns: When the oldest of them was closed, or one before it.
        lock: Held while the pending steps are resolved, by whichever thread does it. Taken by `with` where a signal
            handler may raise, and by nobody who finds it busy: so no thread waits for another, nor for itself.
        busy: Whether they are being resolved.
    """

    __slots__ = ("busy", "lock", "open", "pending", "thread", "waiting", "waiting_since_ns")

    busy: bool
    lock: Any
    open: dict[int, Any]
    pending: Any
    thread: Any
    waiting: int
    waiting_since_ns: int


class StepRecord:
    """One step, with its stages in the order in which they were entered.

    Attributes:
        capture: What it is captured by.
        kind: What it does.
        number: Of this process; in an engine's worker the engine's.
        held: Sees to it that it is closed when nobody holds it any more.
        ids: Which trace it belongs to; None if to none.
        rank: The worker's in its engine, and whether its output is what the engine waits for.
        bare: Whether it is only there for a stage that runs in no step, and has no span of its own.
        requests: What it is linked to, as it was given.
        attributes: What the program says of it, taken when it was given.
        stages: Its stages.
        outer: The step around it, if there is one.
        thread: The one that it was opened on.
        opened_ns: Host time.
        closed_ns: Host time; 0 while it is open, -1 before.
        error: The type of what went wrong in it.
        hang_reported: Whether it has been reported as unfinished.
    """

    __slots__ = (
        "attributes",
        "bare",
        "capture",
        "closed_ns",
        "error",
        "hang_reported",
        "held",
        "ids",
        "kind",
        "number",
        "opened_ns",
        "outer",
        "rank",
        "requests",
        "stages",
        "thread",
    )

    attributes: dict[str, Any] | None
    bare: bool
    capture: Any
    closed_ns: int
    error: type[BaseException] | None
    hang_reported: bool
    held: Any
    ids: Ids | None
    kind: str
    number: int
    opened_ns: int
    outer: Any
    rank: Any
    requests: tuple[Any, ...]
    stages: list[Any]
    thread: Any

    def open(self) -> Self:
        """Begin the step on the calling thread."""
        if self.closed_ns != NOT_OPENED:
            self._open_again()
            return self
        try:
            capture = self.capture
            self.outer = open_step.get()
            if (self.outer is not None or capture.device_is_open_question) and not self._find_place():
                return self
            self.thread = thread = capture.local.thread
            if not self.number:
                self.number = next(capture.step_numbers)
            if self.ids is None:
                self.ids = self._choose()
            self.opened_ns = perf_counter_ns()
            self.closed_ns = 0
            thread.open[id(self)] = self
            open_step.set(self)
        except BaseException as error:
            if self._not_opened(error):
                raise
        return self

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
        thread.waiting += 1 + len(self.stages)
        self.capture.step_closed(thread, closed_ns)

    def _open_again(self) -> None:
        raise NotImplementedError

    def _find_place(self) -> bool:
        raise NotImplementedError

    def _choose(self) -> Ids | None:
        raise NotImplementedError

    def _not_opened(self, error: BaseException) -> bool:
        raise NotImplementedError

    def let_go(self) -> None:
        """Nobody can close it any more."""
        raise NotImplementedError


class Handle:
    """A step in the program's hands. Let go while it is open, because a signal handler raised, it is closed.

    Not by `__del__`: what a signal handler raises in the midst of that, Python swallows.
    """

    __slots__ = ("__weakref__", "step")

    def __init__(self, step: StepRecord) -> None:
        self.step = step

    def open(self) -> Handle:
        """Begin the step on the calling thread."""
        step = self.step
        step.held = weakref.ref(self, lambda _: step.let_go() if step.closed_ns == 0 else None)  # before it is open
        step.open()
        return self

    def close(self, error: type[BaseException] | None = None) -> None:
        """End the step. `error` is the type of what went wrong in it."""
        self.step.close(error)
        self.step.held = None

    def __enter__(self) -> None:
        self.open()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(kind)


class StageRecord:
    """One use of a stage.

    Attributes:
        capture: What it is captured by.
        name: What it is called.
        attributes: What the program says of it, taken when it was given.
        step: The step it belongs to; None before it is entered, and for a stage that is left out.
        pair: Its events; None where only the host times it, and once it is resolved.
        host: Whether it does no work on the device: then only the host times it, and it is left out where no step is.
        stream: Where it ran: `device_index` and `stream_id`.
        entered_ns: Host time just before the start event was recorded.
        exited_ns: Host time just before the end event was recorded; 0 while the stage is open.
        error: The type of what went out of it.
        device_ns: When it started on the device's own clock; None before it is read, and where only the host timed it.
        duration_ns: How long it took on the device; None in the same way.
    """

    __slots__ = (
        "attributes",
        "capture",
        "device_ns",
        "duration_ns",
        "entered_ns",
        "error",
        "exited_ns",
        "host",
        "name",
        "pair",
        "step",
        "stream",
    )

    attributes: dict[str, Any]
    capture: Any
    device_ns: int | None
    duration_ns: int | None
    entered_ns: int
    error: type[BaseException] | None
    exited_ns: int
    host: bool
    name: str
    pair: Any
    step: Any
    stream: Any

    def __enter__(self) -> None:  # noqa: C901 (what it calls out to costs more than all of it)
        if self.step is not None and not self._enter_again():
            return
        pair = None
        try:
            capture = self.capture
            step = open_step.get()
            if step is None or step.closed_ns or step.bare or step.capture is not capture:
                step = self._step(step)
                if step is None:
                    return
            stream: Any = HOST_STREAM
            if not self.host:
                stream = capture.streams.get(capture.current_stream_key()) or capture.stream()
            if not stream.timed:
                if len(step.stages) >= MAX_STAGES:
                    self._too_many()
            elif stream.free:
                pair = stream.free.pop()
            else:
                pair = self._another_pair(step, stream)
            if stream.side:
                self._capture_check()
            self.pair = pair
            self.stream = stream
            self.exited_ns = 0
            self.entered_ns = perf_counter_ns()
            step.stages.append(self)
            self.step = step
            if pair is not None:
                pair.record_start(stream.handle)
        except BaseException as error:
            if self._not_entered(pair, error):
                raise

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        step = self.step
        if step is None:
            return
        exited_ns = 0
        try:
            exited_ns = perf_counter_ns()
            self.error = kind
            pair = self.pair
            if pair is not None:
                pair.record_end(self.stream.handle)
            self.exited_ns = exited_ns  # last: from here on the idle thread may find the stage done
            if step.bare and step.stages and step.stages[0] is self:
                step.close()
        except BaseException as error:
            if self._not_exited(step, exited_ns, error):
                raise

    def _enter_again(self) -> bool:
        raise NotImplementedError

    def _step(self, around: Any) -> Any:
        raise NotImplementedError

    def _another_pair(self, step: Any, stream: Any) -> Any:
        raise NotImplementedError

    def _too_many(self) -> None:
        raise NotImplementedError

    def _capture_check(self) -> None:
        raise NotImplementedError

    def _not_entered(self, pair: Any, error: BaseException) -> bool:
        raise NotImplementedError

    def _not_exited(self, step: Any, exited_ns: int, error: BaseException) -> bool:
        raise NotImplementedError


def new_step(
    of: type[_T],
    capture: Any,
    kind: str,
    requests: tuple[Any, ...],
    attributes: dict[str, Any] | None,
    ids: Ids | None = None,
    rank: Rank = NO_RANK,
    number: int = 0,
) -> _T:
    """A step to be opened.

    Args:
        of: What it is to be.
        capture: What it is captured by.
        kind: What it does.
        requests: What it is linked to.
        attributes: What the program says of it.
        ids: Chosen when it opens, unless they are given. Without a trace id it is no trace; by its parent it may be
            part of an engine's step all the same.
        rank: The worker's in its engine.
        number: An engine's, so that it is the same on every rank; else one of this process is given to it.
    """
    step = _new(of)
    step.capture = capture
    step.kind = kind
    step.requests = requests
    step.attributes = attributes
    step.bare = False
    step.ids = ids
    step.rank = rank
    step.number = number
    step.stages = []
    step.closed_ns = NOT_OPENED
    step.outer = None
    step.error = None
    step.hang_reported = False
    return step


def new_stage(of: type[_S], capture: Any, name: str, attributes: dict[str, Any], host: bool = False) -> _S:
    """A stage to be entered. Not by a constructor: without one it is made in two thirds of the time."""
    stage = _new(of)
    stage.capture = capture
    stage.name = name
    stage.attributes = attributes
    stage.host = host
    stage.step = stage.device_ns = stage.duration_ns = None
    return stage


def last_stages(step: StepRecord, done_on: set[int]) -> dict[int, Any] | None:
    """The stages to ask the device of whether a step is done: the last on each stream. None: one has not been left.

    Args:
        step: A step that is closed.
        done_on: The streams, by identity, that need not be asked.
    """
    last: dict[int, Any] = {}
    for stage in step.stages:
        if not stage.exited_ns:
            return None
        if stage.pair is not None:
            stream = id(stage.stream)
            if stream not in done_on and (stream not in last or stage.exited_ns >= last[stream].exited_ns):
                last[stream] = stage
    return last


def timed(step: StepRecord) -> list[Any]:
    """The stages of a step that have event pairs, to be read."""
    return [stage for stage in step.stages if stage.pair is not None]


def pack(
    steps: list[Any],
    seen_ns: int,
    dropped: dict[str, int],
    text: Callable[[object], str],
    encode: Callable[[object], bytes],
    links_of: Callable[[Any], list[bytes]],
) -> bytes:
    """Steps as `frames.Several`, each as `frames.Step` and its stages as `frames.Stage`, but for their nesting.

    Args:
        steps: What was resolved.
        seen_ns: When.
        dropped: Drop counts, which go with the first.
        text: Makes a text that can be sent of a name.
        encode: Encodes anything.
        links_of: The spans that a step with requests is linked to.
    """
    packed: list[tuple[Any, ...]] = []
    for step in steps:
        stages = [
            (
                text(stage.name),
                -1,
                stage.entered_ns,
                stage.exited_ns,
                stage.device_ns,
                stage.exited_ns - stage.entered_ns if stage.duration_ns is None else stage.duration_ns,
                stage.stream.device_index,
                stage.stream.stream_id,
                None if stage.error is None else text(stage.error.__qualname__),
                stage.attributes or None,
            )
            for stage in step.stages
        ]
        trace_id, span_id, parent_span_id, kept = step.ids or NO_IDS
        packed.append(
            (
                "step",
                trace_id,
                span_id,
                parent_span_id,
                step.bare,
                step.rank[0],
                step.rank[1],
                step.number,
                text(step.kind),
                step.opened_ns,
                step.closed_ns,
                seen_ns,
                None if step.error is None else text(step.error.__qualname__),
                step.attributes or None,
                links_of(step) if step.requests and step.ids is not None else [],
                {} if packed else dropped,
                stages,
                kept,
            )
        )
    return encode(("several", packed))
