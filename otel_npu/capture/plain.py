"""What a stage and a step *are*, how a stage begins and ends, and how steps are packed: in Python.

`_native.c` says the same where it is built; what changes here changes there. What happens seldom is said once, by
`stages.Stage`, which derives from either.

A signal handler of the program's may raise between any two lines. So the way in and the way out are one `try` each, and
what it leaves half done is undone.
"""

from __future__ import annotations

from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, TypeVar

from otel_npu.capture.context import NO_IDS, open_step
from otel_npu.wire.frames import MAX_STAGES

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from otel_npu.capture.context import Ids

_S = TypeVar("_S", bound="StageRecord")

_new = object.__new__


class StepRecord:
    """One step, with its stages in the order in which they were entered.

    Attributes:
        capture: What it is captured by.
        kind: What it does.
        number: Of this process; in an engine's worker the engine's.
        ids: Which trace it belongs to; None if to none.
        rank: The worker's in its engine, and whether its output is what the engine waits for.
        bare: Whether it is only there for a stage that runs in no step, and has no span of its own.
        requests: What it is linked to, as it was given.
        attributes: What the program says of it, taken when it was given.
        stages: Its stages.
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
        "ids",
        "kind",
        "number",
        "opened_ns",
        "rank",
        "requests",
        "stages",
    )

    attributes: dict[str, Any] | None
    bare: bool
    capture: Any
    closed_ns: int
    error: type[BaseException] | None
    hang_reported: bool
    ids: Ids | None
    kind: str
    number: int
    opened_ns: int
    rank: Any
    requests: tuple[Any, ...]
    stages: list[Any]


class StageRecord:
    """One use of a stage.

    Attributes:
        capture: What it is captured by.
        name: What it is called.
        attributes: What the program says of it, taken when it was given.
        step: The step it belongs to; None before it is entered, and for a stage that is left out.
        pair: Its events; None where only the host times it, and once it is resolved.
        stream: Where it ran: `device_index` and `stream_id`.
        entered_ns: Host time just before the start event was recorded.
        exited_ns: Host time just before the end event was recorded; 0 while the stage is open.
        error: The type of what went out of it.
        device_ns: Set when it is read: start on the device's own clock, None where only the host timed it.
        duration_ns: Set when it is read; None where only the host timed it.
    """

    __slots__ = (
        "attributes",
        "capture",
        "device_ns",
        "duration_ns",
        "entered_ns",
        "error",
        "exited_ns",
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
    name: str
    pair: Any
    step: Any
    stream: Any

    def __enter__(self) -> None:
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
            self._not_entered(pair, error)

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
            self._not_exited(step, exited_ns, error)

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

    def _not_entered(self, pair: Any, error: BaseException) -> None:
        raise NotImplementedError

    def _not_exited(self, step: Any, exited_ns: int, error: BaseException) -> None:
        raise NotImplementedError


def new_stage(of: type[_S], capture: Any, name: str, attributes: dict[str, Any]) -> _S:
    """A stage to be entered. Not by a constructor: without one it is made in two thirds of the time."""
    stage = _new(of)
    stage.capture = capture
    stage.name = name
    stage.attributes = attributes
    stage.step = None
    return stage


def pack(
    steps: list[Any],
    seen_ns: int,
    dropped: dict[str, int],
    text: Callable[[object], str],
    encode: Callable[[object], bytes],
    links_of: Callable[[Any], list[bytes]],
) -> bytes:
    """Steps as `frames.Steps`, each as `frames.Step` and its stages as `frames.Stage`, but for their nesting.

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
    return encode(("steps", packed))
