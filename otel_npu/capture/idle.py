"""The idle thread: what goes on while the model's threads capture nothing, and what must not cost them anything."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from time import perf_counter_ns
from typing import TYPE_CHECKING, Final

from otel_npu import announce, semconv
from otel_npu.capture import hang
from otel_npu.capture.resolver import give_up
from otel_npu.drops import REPORT_SECONDS
from otel_npu.wire import frames

if TYPE_CHECKING:
    from otel_npu.capture.link import RelayLink
    from otel_npu.capture.resolver import Resolver
    from otel_npu.capture.shared import Capture, Thread
    from otel_npu.wire.channel import Channel

_log = logging.getLogger("otel_npu")

IDLE_SECONDS: Final = 0.05
"""Between two looks. Seldom: where the model's thread runs Python just then, a look takes the GIL from it, and it waits
for two switches of threads beside the look itself. What is resolved together is cheaper, too: all but the first is
warm. Not more seldom: what is closed and not yet sent is lost where a process is killed, as vLLM's workers are."""
QUIET_SECONDS: Final = 0.2
"""The same while capture is switched off, and between two looks at the relay: they cost as much as all else there is
to do."""
WATCH_SECONDS: Final = 1.0
_STEPS_PER_TICK: Final = 96
_CLOSING_NS: Final = 1_000_000_000  # far longer than a step takes to close
_PING_BUDGET_NS: Final = 100_000


class IdleThread:
    """Keeps the relay, resolves for threads that close no step, watches for hangs, and looks at the devices' clocks.

    Args:
        capture: What is captured.
        resolver: Resolves it.
        channel: Where frames go.
        link: Keeps the channel connected.
    """

    def __init__(self, capture: Capture, resolver: Resolver, channel: Channel, link: RelayLink) -> None:
        self._capture = capture
        self._resolver = resolver
        self._channel = channel
        self._link = link
        self.flushing = False
        """Whether somebody waits for all that is closed to be resolved."""
        self._pinged = 0
        """How many devices have been pinged."""
        self._next_drop_line = time.monotonic() + REPORT_SECONDS
        self._device_since: float | None = None
        """Since when the device is settled, until it was said that tracing is on."""
        self._stopping = False
        # Held but for when somebody wants a look. Not an event, for whose own lock a signal handler that flushes in the
        # midst of a flush would wait for ever.
        self._asleep = threading.Lock()
        self._asleep.acquire()
        self._thread = threading.Thread(target=self._run, name="otel-npu", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def wake(self) -> None:
        """Look now."""
        with contextlib.suppress(RuntimeError):  # it is about to look
            self._asleep.release()

    def stop(self, timeout_seconds: float) -> None:
        """End; waits at most this long."""
        self._stopping = True
        self.wake()
        self._thread.join(timeout_seconds)

    def new_device(self) -> None:
        """The clock of the device that is used from now on is wanted for the first steps already."""
        self._pinged = 0
        now = time.monotonic()
        self._device_since = None if self._announce(now) else now

    def _announce(self, since: float) -> bool:
        return announce.is_on(self._capture.settings, self._capture.device, time.monotonic() - since)

    def _run(self) -> None:
        next_keep = next_watch = 0.0
        woken = False
        while True:
            try:
                now = time.monotonic()
                if woken or now >= next_keep or not self._channel.connected:
                    next_keep = now + QUIET_SECONDS
                    self._keep()
                self.resolve()
                self._channel.drain()
                if now >= next_watch:
                    next_watch = now + WATCH_SECONDS
                    self._watch()
                    self.ping()
                elif len(self._capture.device.pools) > self._pinged:
                    self.ping()
            except Exception:
                self._capture.own_fault()
            woken = self._asleep.acquire(timeout=IDLE_SECONDS if self._busy() else QUIET_SECONDS)
            if self._stopping:
                return

    def _keep(self) -> None:
        """Keep the relay, and do what it says."""
        self._link.keep()
        wanted = self._channel.take_switch()
        if wanted is not None:
            self._capture.obey(on=wanted)

    def _busy(self) -> bool:
        capture = self._capture
        return capture.on or self.flushing or any(thread.pending or thread.open for thread in list(capture.threads))

    def resolve(self) -> None:
        """Resolve what the devices have finished."""
        for thread in list(self._capture.threads):
            if thread.pending:
                self.resolve_for(thread)

    def resolve_for(self, thread: Thread) -> None:
        """Resolve for this thread, unless it is being resolved."""
        if not thread.busy and thread.lock.acquire(blocking=False):
            try:
                thread.busy = True
                thread.waiting = 0
                self._adopt_thread_for(thread)
                self._resolver.resolve(thread, _STEPS_PER_TICK)
            finally:
                thread.busy = False
                thread.lock.release()

    def _adopt_thread_for(self, thread: Thread) -> None:
        """Make the idle thread fit for the events of the step that is next to be resolved."""
        step = thread.pending[0] if thread.pending else next(iter(list(thread.open.values())), None)
        for stage in step.stages if step is not None else ():
            if stage.pair is not None:
                stage.pair.pool.device.adopt_thread(stage.pair.pool.device_index)
                return

    def _watch(self) -> None:
        threads = self._capture.threads
        for thread in list(threads):
            self._look_after(thread)
            if not thread.alive and not thread.open and not thread.pending:
                threads.remove(thread)
        for pool in list(self._capture.device.pools.values()):
            pool.reclaim()
        if self._device_since is not None and self._capture.on and self._announce(self._device_since):
            self._device_since = None
        if time.monotonic() >= self._next_drop_line:
            self._next_drop_line = time.monotonic() + REPORT_SECONDS
            self.log_drops()

    def _look_after(self, thread: Thread) -> None:
        if thread.busy or not thread.lock.acquire(blocking=False):
            return
        try:
            self._adopt_thread_for(thread)
            for key, step in list(thread.open.items()):
                if 0 < step.closed_ns < perf_counter_ns() - _CLOSING_NS:  # a signal handler raised in its close
                    del thread.open[key]
                    if step not in thread.pending:
                        thread.pending.append(step)
                elif not thread.alive:  # nobody closes it any more, and others want its events
                    self._capture.drops.add(semconv.INTERRUPTED)
                    step.closed_ns = perf_counter_ns()
                    give_up(step, self._capture.drops)
                    del thread.open[key]
            hang.watch(thread, self._capture.settings, self._capture.drops, self._send)
        except Exception:
            self._capture.own_fault()
        finally:
            thread.lock.release()

    def log_drops(self) -> None:
        """What was left out since the last time, in one line."""
        line = self._capture.drops.take_line()
        if line:
            _log.warning("left out in the last minute: %s", line)

    def ping(self) -> None:
        """Look at the clock of each device that is in use."""
        if not self._capture.on:
            return
        device = self._capture.device
        pools = list(device.pools.values())
        # Not while a thread captures a graph: nobody knows what a driver makes of other work meanwhile.
        if not pools or any(device.captured(key) for key in list(self._capture.streams)):
            return
        self._pinged = len(pools)
        for pool in pools:
            if pool.device.host_clock:
                continue
            try:
                pool.device.adopt_thread(pool.device_index)
                ping = pool.device.ping(pool.device_index, _PING_BUDGET_NS)
            except (OSError, RuntimeError):
                _log.debug("a ping failed", exc_info=True)
                ping = None
            if ping is None:
                self._capture.drops.add(semconv.PING_UNANSWERED)
            else:
                self._send(frames.Ping(pool.device_index, *ping))

    def _send(self, frame: frames.Frame) -> None:
        self._channel.send(frames.encode(frame))
