"""Deferred resolution: a step that the device has finished is read, turned into a frame and sent.

Nothing here waits for the device. A step that is not done is left for the next time.
"""

from __future__ import annotations

import logging
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, Final

from otel_npu import semconv
from otel_npu.capture import context
from otel_npu.wire import frames

if TYPE_CHECKING:
    from otel_npu.capture.stages import Stage
    from otel_npu.capture.steps import Step, ThreadState
    from otel_npu.devices.pair import Pair
    from otel_npu.drops import Drops
    from otel_npu.wire.channel import Channel

_log = logging.getLogger("otel_npu")

MAX_TEXT: Final = 4096
MAX_LINKS: Final = 4096  # of one step: its frame has to fit into a packet
_INT64: Final = 1 << 63


class Resolver:
    """Reads finished steps and sends them.

    Args:
        channel: Where frames go.
        drops: Where what could not be read is counted, and whose counts travel with the frames.
        log_stages: Whether each step is logged as one line.
    """

    def __init__(self, channel: Channel, drops: Drops, *, log_stages: bool) -> None:
        self._channel = channel
        self._drops = drops
        self._log_stages = log_stages

    def resolve(self, state: ThreadState, most: int) -> int:
        """Resolve up to so many of the thread's oldest steps; how many were done. Hold the state's lock."""
        pending = state.pending
        resolved = 0
        while pending and resolved < most:
            step = pending[0]
            try:
                if not step.ready():
                    break
            except Exception:  # a device that fails a query fails the model too, and says so there
                _log.debug("a query failed", exc_info=True)
                give_up(step, self._drops)
            pending.popleft()
            self._finish(step)
            resolved += 1
        return resolved

    def _finish(self, step: Step) -> None:
        seen_ns = perf_counter_ns()
        stages = step.stages
        timed = []
        for stage in stages:
            if stage.pair is None:
                # Host-timed, unless somebody has waited for it.
                stage.device_ns = getattr(stage, "device_ns", None)
                stage.duration_ns = getattr(stage, "duration_ns", None)
            else:
                timed.append(stage)
        if timed:
            if step.one_stream:
                self._read(timed)
            else:
                pools: dict[int, list[Stage]] = {}
                for stage in timed:
                    pools.setdefault(id(_pair(stage).pool), []).append(stage)
                for group in pools.values():
                    self._read(group)
        frame = self._frame(step, seen_ns)
        self._channel.send(frames.encode(frame), frame.dropped)
        if self._log_stages and not step.bare:
            _log_line(step)
        if step.hang_reported:
            _log.warning(
                "step %d (%s) has finished after all, %.1f s after it began",
                step.number,
                step.kind or "step",
                (seen_ns - step.opened_ns) * 1e-9,
            )
        # The step and its stages refer to each other; let them go without the garbage collector.
        step.stages = []
        step.last = None

    def _read(self, timed: list[Stage]) -> None:
        """Give stages of one device their times, and their pairs back to the pool."""
        pairs = [_pair(stage) for stage in timed]
        pool = pairs[0].pool
        read = pool.device.read
        try:
            times: list[Any] = read(pool.device_index, pairs)
        except Exception:
            _log.debug("reading %d event pairs failed", len(pairs), exc_info=True)
            times = []
            for pair in pairs:  # one bad event must not cost the others their times
                try:
                    times += read(pool.device_index, [pair])
                except Exception:
                    times.append(None)
        unreadable = 0
        host_clock = pool.device.host_clock
        for stage, time in zip(timed, times, strict=True):
            # An end before its start is an old timing: the end was recorded into a graph.
            if time is None or time[1] < 0:
                unreadable += 1
                stage.device_ns = stage.duration_ns = None
            else:
                stage.device_ns = None if host_clock else time[0]
                stage.duration_ns = time[1]
        if unreadable:
            self._drops.add(semconv.TIMES_UNREADABLE, unreadable)
        for stage in timed:
            stage.pair = None
        pool.free.extend(pairs)

    def _frame(self, step: Step, seen_ns: int) -> frames.Step:
        stages: list[frames.Stage] = []
        around: list[int] = []  # the stages, by index, that the next one may lie in
        for index, stage in enumerate(step.stages):
            exited_ns = stage.exited_ns
            while around and stages[around[-1]].exited_ns <= stage.entered_ns:
                around.pop()
            # Tasks of one thread may overlap without one being in the other.
            parent = next((outer for outer in reversed(around) if stages[outer].exited_ns >= exited_ns), -1)
            around.append(index)
            stages.append(
                frames.Stage(
                    stage.name,
                    parent,
                    stage.entered_ns,
                    exited_ns,
                    stage.device_ns,
                    exited_ns - stage.entered_ns if stage.duration_ns is None else stage.duration_ns,
                    stage.stream.device_index,
                    stage.stream.stream_id,
                    None if stage.error is None else stage.error.__qualname__,
                    self._attributes(stage.attributes) if stage.attributes else None,
                )
            )
        ids = step.ids or context.NO_IDS
        return frames.Step(
            ids.trace_id,
            ids.span_id,
            ids.parent_span_id,
            step.bare,
            step.rank.number,
            step.rank.returns_output,
            step.number,
            step.kind,
            step.opened_ns,
            step.closed_ns,
            seen_ns,
            None if step.error is None else step.error.__qualname__,
            self._attributes(step.attributes) if step.attributes else None,
            self._links(step) if step.requests and ids.kept else [],
            self._drops.take_unsent(),
            stages,
            ids.kept,
        )

    def _links(self, step: Step) -> list[bytes]:
        over = len(step.requests) - MAX_LINKS
        if over > 0:
            self._drops.add(semconv.TOO_MANY_LINKS, over)
        links = [context.link(request) for request in step.requests[:MAX_LINKS]]
        good = [link for link in links if link is not None]
        if len(good) < len(links):
            self._drops.add(semconv.BAD_LINK, len(links) - len(good))
        return [link for link in good if link[-1] & context.SAMPLED]  # to spans that are kept alone

    def _attributes(self, attributes: dict[str, Any]) -> frames.Attributes:
        good: frames.Attributes = {}
        for key, value in attributes.items():
            clean = _clean(value)
            if clean is None:
                self._drops.add(semconv.BAD_ATTRIBUTE)
            else:
                good[key] = clean
        return good


def _pair(stage: Stage) -> Pair:
    assert stage.pair is not None
    return stage.pair


def give_up(step: Step, drops: Drops) -> None:
    """Let the step go with its host times: its events can't be asked, or a stage of it never ends."""
    for stage in step.stages:
        if not stage.exited_ns:
            stage.exited_ns = max(step.closed_ns, stage.entered_ns)
            stage.step = None  # its exit, should it come, finds nothing to do
            stage.error = None
        if stage.pair is not None:
            stage.pair.pool.free.append(stage.pair)
            stage.pair = None
            drops.add(semconv.TIMES_UNREADABLE)


def _clean(value: Any) -> frames.AttributeValue | None:
    """The value if a span can carry it. Nothing else is converted: `str()` of a tensor waits for the device."""
    if isinstance(value, str):
        text = value[:MAX_TEXT]
        return text if text.isascii() or _encodable(text) else None
    if isinstance(value, bool | float):
        # What is derived from a float, such as numpy's, the encoder does not take.
        return value if isinstance(value, bool) else float(value)
    if isinstance(value, int):
        return int(value) if -_INT64 <= value < _INT64 else None
    if isinstance(value, list | tuple):
        items = [_clean(item) for item in value]
        if len({type(item) for item in items}) == 1 and not isinstance(items[0], list | None):
            return items  # type: ignore[return-value]
        return [] if not items else None
    return None


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True


def _log_line(step: Step) -> None:
    durations: dict[str, int] = {}
    for stage in reversed(step.stages):  # the last first and by the engine's own names, as vllm-ascend printed them
        duration_ns = stage.exited_ns - stage.entered_ns if stage.duration_ns is None else stage.duration_ns
        name = stage.attributes.get(semconv.RAW_NAME, stage.name)
        durations[name] = durations.get(name, 0) + duration_ns
    if durations:
        tags = " ".join(f"[{name}]:{duration_ns * 1e-6:.2f}ms" for name, duration_ns in durations.items())
        _log.info("Profile execute duration [%s]: %s", (step.kind or "step").capitalize(), tags)
