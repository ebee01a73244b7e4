"""Deferred resolution: steps that the device has finished are read, made into frames, and sent in one packet.

Nothing here waits for the device. A step that is not done is left for the next time. Between two steps a server runs
millions of instructions, so what is run here once is always cold: it is run for several steps at a time, each part of
it for all of them.
"""

from __future__ import annotations

import itertools
import logging
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, Final

from otel_npu import semconv
from otel_npu.capture import arguments, context
from otel_npu.capture.records import abandoned, last_stages, pack, timed
from otel_npu.interrupts import from_outside
from otel_npu.wire import frames

if TYPE_CHECKING:
    from otel_npu.capture.records import StageRecord, StepRecord
    from otel_npu.capture.shared import Thread
    from otel_npu.devices.device import Pair
    from otel_npu.drops import Drops
    from otel_npu.wire.channel import Channel

_log = logging.getLogger("otel_npu")

_MOST: Final = frames.MAX_NANOSECONDS
_DROPS_BYTES: Final = 1024  # of the drop counts that may go with a step
_STEPS_PER_PACKET: Final = 8  # what is too large for one is packed again in halves: not megabytes
_MAP_BYTES: Final = 2  # of a map, beyond the one entry
MAX_LINKS: Final = 4096  # of one step: its frame has to fit into a packet


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

    def resolve(self, thread: Thread, most: int) -> int:
        """Resolve up to so many of the thread's oldest steps; how many were done. Hold the thread's lock."""
        pending = thread.pending
        steps: list[StepRecord] = list(itertools.islice(pending, self._finished(pending, most)))
        if not steps:
            return 0
        packets: list[tuple[bytes, dict[str, int]]] = []
        sending = False
        try:
            for _ in steps:
                pending.popleft()
            seen_ns = perf_counter_ns()
            self._make(steps, seen_ns, packets)
            sending = True
            while packets:
                self._channel.send(*packets[0])
                del packets[0]
        except BaseException as error:
            for _, dropped in packets:
                self._drops.put_back(dropped)
            if from_outside(error) and not sending:
                _put_back(steps, pending)
            else:
                self._lose(steps, pending)
            raise
        for step in steps:
            if self._log_stages and not step.bare:
                log_line(step)
            if step.hang_reported:
                tell_finished(step, seen_ns)
            step.stages = []  # they refer to each other; let them go without the garbage collector
        return len(steps)

    def _make(self, steps: list[StepRecord], seen_ns: int, packets: list[tuple[bytes, dict[str, int]]]) -> None:
        """Read the steps and add the packets that they make, each with the drop counts that go with it."""
        for step in steps:
            stages = timed(step)
            if stages:
                self._read(stages)
        for first in range(0, len(steps), _STEPS_PER_PACKET):
            self._packets(steps[first : first + _STEPS_PER_PACKET], seen_ns, packets)

    def _lose(self, steps: list[StepRecord], pending: Any) -> None:
        """Steps that could not be resolved must not be in the way of the next ones."""
        for step in steps:
            if pending and pending[0] is step:
                pending.popleft()
            give_up(step, self._drops)
        self._drops.add(semconv.INTERRUPTED, len(steps))
        self._drops.lost += len(steps)

    def _finished(self, pending: Any, most: int) -> int:
        """How many of the oldest steps are done.

        A stream works in order. So the newest is asked first, and if it is done, so is all that was before it on its
        streams: mostly this is one query for all of them.
        """
        looked_at = min(most, len(pending))
        done_on: set[int] = set()
        done = [False] * looked_at
        for index in reversed(range(looked_at)):
            step = pending[index]
            try:
                done[index] = _done(step, done_on, self._drops)
            except Exception as error:  # a device that fails a query fails the model too, and says so there
                if from_outside(error):
                    raise
                _log.debug("a query failed", exc_info=True)
                give_up(step, self._drops)
                done[index] = True
        return done.index(False) if False in done else looked_at

    def _read(self, stages: list[StageRecord]) -> None:
        """Give a step's stages that have event pairs their times, and the pairs back to the pool."""
        pools: dict[int, tuple[list[StageRecord], list[Pair]]] = {}
        for stage in stages:
            pair = stage.pair
            if pair is not None:  # a signal handler may have waited for it just now
                of_one_device = pools.setdefault(id(pair.pool), ([], []))
                of_one_device[0].append(stage)
                of_one_device[1].append(pair)
        for of_one_device in pools.values():
            self._read_pairs(*of_one_device)

    def _read_pairs(self, timed: list[StageRecord], pairs: list[Pair]) -> None:
        """The same for stages of one device."""
        pool = pairs[0].pool
        device = pool.device
        try:
            times: list[Any] = device.read(pool.device_index, pairs)
        except Exception as error:
            if from_outside(error):
                raise
            _log.debug("reading %d event pairs failed", len(pairs), exc_info=True)
            times = [self._time(pair) for pair in pairs]  # one bad event must not cost the others their times
        host_clock = device.host_clock
        for stage, time in zip(timed, times, strict=True):
            # An end before its start is an old timing: the end was recorded into a graph. A clock may also be nonsense.
            if time is None or not (-_MOST <= time[0] <= _MOST and 0 <= time[1] <= _MOST):
                self._drops.add(semconv.TIMES_UNREADABLE)
                stage.device_ns = stage.duration_ns = None
            else:
                stage.device_ns = None if host_clock else time[0]
                stage.duration_ns = time[1]
            stage.pair = None
        pool.free.extend(pairs)

    def _time(self, pair: Pair) -> tuple[int, int] | None:
        try:
            return pair.pool.device.read(pair.pool.device_index, [pair])[0]
        except Exception as error:
            if from_outside(error):
                raise
            return None

    def _packets(
        self,
        steps: list[StepRecord],
        seen_ns: int,
        packets: list[tuple[bytes, dict[str, int]]],
        *,
        shrunk: bool = False,
    ) -> None:
        """Add the steps in one packet, or in as many as they need, each with its drop counts.

        One that can't be sent costs no other.
        """
        dropped = self._drops.take_unsent()
        packet = b""
        try:
            packet = self._pack(steps, seen_ns, dropped)
        except Exception as error:
            if from_outside(error):
                self._drops.put_back(dropped)
                raise
            _log.debug("%d steps could not be encoded", len(steps), exc_info=True)
        if packet and (shrunk or len(packet) <= frames.MAX_FRAME_BYTES):
            packets.append((packet, dropped))
            return
        self._drops.put_back(dropped)
        if len(steps) > 1:
            half = len(steps) // 2
            self._packets(steps[:half], seen_ns, packets)
            self._packets(steps[half:], seen_ns, packets)
        elif packet:
            self._shrink(steps[0])
            self._packets(steps, seen_ns, packets, shrunk=True)
        else:
            self._drops.add(semconv.INTERNAL_ERROR)
            self._drops.lost += 1

    def _shrink(self, step: StepRecord) -> None:
        """Take the largest attributes from a step that is too large for a packet, until it fits.

        Where that is not enough, names are cut: each of a thousand stages may have so many bytes, and no more.
        """
        holders: list[Any] = [step, *step.stages]
        given = [holder.attributes or {} for holder in holders]
        for holder in holders:
            holder.attributes = {}
        over = self._size(step) - frames.MAX_FRAME_BYTES
        if over > 0:
            most = max(8, arguments.MAX_NAME - 1 - over // max(1, len(step.stages)))
            for stage in step.stages:
                stage.name = arguments.text(stage.name).encode()[:most].decode(errors="ignore")
        room = frames.MAX_FRAME_BYTES - self._size(step)
        sizes = sorted(
            (len(frames.encode({key: value})) + _MAP_BYTES, index, key)
            for index, attributes in enumerate(given)
            for key, value in attributes.items()
        )
        for size, index, key in sizes:
            room -= size
            if room < 0:
                self._drops.add(semconv.ATTRIBUTE_TOO_LARGE)
            else:
                holders[index].attributes[key] = given[index][key]

    def _size(self, step: StepRecord) -> int:
        return len(self._pack([step], 1 << 62, {})) + _DROPS_BYTES

    def _pack(self, steps: list[StepRecord], seen_ns: int, dropped: dict[str, int]) -> bytes:
        return pack(steps, seen_ns, dropped, arguments.text, frames.encode, self._links)

    def _links(self, step: StepRecord) -> list[bytes]:
        if step.ids is None or not step.ids.kept:
            return []
        over = len(step.requests) - MAX_LINKS
        if over > 0:
            self._drops.add(semconv.TOO_MANY_LINKS, over)
        links = [context.link(request) for request in step.requests[:MAX_LINKS]]
        good = [link for link in links if link is not None]
        if len(good) < len(links):
            self._drops.add(semconv.BAD_LINK, len(links) - len(good))
        return [link for link in good if link[-1] & context.SAMPLED]  # to spans that are kept alone


_NONE: Final[dict[str, int]] = {}


def _put_back(steps: list[StepRecord], pending: Any) -> None:
    """The program's own exception struck before anything was sent: they are resolved the next time."""
    pending.extendleft(step for step in reversed(steps) if step not in pending)


def _done(step: StepRecord, done_on: set[int], drops: Drops) -> bool:
    """Whether every stage has ended, on the host and on the device: one query a stream.

    Args:
        step: A step that is closed.
        done_on: The streams, by identity, of which something later than the step is done; its own are added.
        drops: Where a stage is counted whose end never comes.
    """
    stages = step.stages
    last = last_stages(step, done_on)
    if last is None:
        for index in range(len(stages)):  # none of them in a variable: who else holds it is looked at
            if not stages[index].exited_ns:
                if not abandoned(stages, index):
                    return False
                drops.add(semconv.INTERRUPTED)
                let_go(stages[index], step.closed_ns, drops)
        last = last_stages(step, done_on)
        if last is None:  # another thread has entered one meanwhile
            return False
    for stream, stage in last.items():
        pair = stage.pair
        if pair is not None and not pair.end.query():
            return False
        done_on.add(stream)
    return True


def let_go(stage: StageRecord, closed_ns: int, drops: Drops) -> None:
    """End a stage whose exit will not come, with host times alone."""
    stage.error = None
    stage.exited_ns = max(closed_ns, stage.entered_ns)
    pair, stage.pair = stage.pair, None
    if pair is not None:
        pair.pool.free.append(pair)
        drops.add(semconv.TIMES_UNREADABLE)


def give_up(step: StepRecord, drops: Drops) -> None:
    """Let the step go with its host times: its events can't be asked, or a stage of it never ends."""
    for stage in step.stages:
        if not stage.exited_ns:
            let_go(stage, step.closed_ns, drops)
            if hasattr(stage, "step"):
                stage.step = None  # its exit, should it come, finds nothing to do
        if stage.pair is not None:
            stage.pair.pool.free.append(stage.pair)
            stage.pair = None
            drops.add(semconv.TIMES_UNREADABLE)


def tell_finished(step: StepRecord, seen_ns: int) -> None:
    """Say of a step that was reported as unfinished that it is not."""
    _log.warning(
        "step %d (%s) has finished after all, %.1f s after it began",
        step.number,
        step.kind or "step",
        (seen_ns - step.opened_ns) * 1e-9,
    )


def log_line(step: StepRecord) -> None:
    """The line that `ProfileExecuteDuration` printed, from what was measured."""
    durations: dict[str, int] = {}
    stages = step.stages
    if step.rank.number >= 0:
        stages = stages[::-1]  # vllm-ascend printed the last first, and by its own names
    for stage in stages:
        duration_ns = stage.exited_ns - stage.entered_ns if stage.duration_ns is None else stage.duration_ns
        name = stage.attributes.get(semconv.RAW_NAME, stage.name)
        durations[name] = durations.get(name, 0) + duration_ns
    if durations:
        tags = " ".join(f"[{name}]:{duration_ns * 1e-6:.2f}ms" for name, duration_ns in durations.items())
        _log.info("Profile execute duration [%s]: %s", (step.kind or "step").capitalize(), tags)
