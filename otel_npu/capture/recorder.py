"""What one traced process has: what is captured, its channel to the relay, and one idle thread."""

from __future__ import annotations

import itertools
import os
import socket
import sys
import threading
import time
import uuid
from typing import TYPE_CHECKING, Final

from otel_npu import semconv
from otel_npu.capture.idle import IdleThread
from otel_npu.capture.link import RelayLink
from otel_npu.capture.records import BATCH, BATCH_NS, MAX_PENDING
from otel_npu.capture.resolver import Resolver, give_up
from otel_npu.capture.shared import Capture
from otel_npu.drops import Drops
from otel_npu.wire import frames
from otel_npu.wire.channel import Channel

if TYPE_CHECKING:
    from collections.abc import Callable

    from otel_npu.capture.records import Rank
    from otel_npu.capture.shared import Thread
    from otel_npu.devices.device import Device
    from otel_npu.settings import Settings

EXIT_SECONDS: Final = 2.0
_LONGEST_WAIT: Final = 3600.0


class Recorder(Capture):
    """Captures stages and steps, resolves them, and sends them.

    Args:
        settings: What was chosen.
        device: The device to record on; None finds it by the settings once the program has initialised it.
        turn_off: Called with the recorder when it is to capture nothing any more.
        switch: Called with the recorder when somebody at the relay wants it to capture again, or not for the moment;
            says whether it does then.
    """

    def __init__(
        self,
        settings: Settings,
        device: Device | None = None,
        turn_off: Callable[[Recorder], None] = lambda _: None,
        switch: Callable[[Recorder, bool], bool] = lambda _, on: on,
    ) -> None:
        super().__init__(settings, device)
        self._turn_off = turn_off
        self._switch = switch
        self._instance_id = str(uuid.UUID(bytes=os.urandom(16), version=4))
        self.channel = Channel(self._hello, self.drops)
        self.defer, self.send_deferred = self.channel.defer, self.channel.send_deferred
        """For frames of which there is one a step: they are sent together with those of the next steps."""
        self._resolver = Resolver(self.channel, self.drops, log_stages=settings.log_stages)
        self._link = RelayLink(self.channel, settings, self.drops)
        self._places: dict[int, frames.Attributes] = {}
        self._flushes = itertools.count(1)
        # Its thread may take it again: a signal handler may flush in the midst of a flush.
        self._flush_lock = threading.RLock()
        self._lost = 0
        self.idle = IdleThread(self, self._resolver, self.channel, self._link)
        self._begin()

    def _begin(self) -> None:
        self.idle.start()

    # Called from the hot path.

    def step_closed(self, thread: Thread, closed_ns: int) -> None:
        """A step boundary: what the device has finished is resolved, once there is enough of it."""
        pending = len(thread.pending)
        if not self.running:  # closed, or a forked child's parent's: nobody resolves or sends any more
            self._let_go(thread)
        elif pending > MAX_PENDING:
            self.drops.add(semconv.BACKLOG_FULL)
            self._let_go(thread, MAX_PENDING)
        elif pending == 1 and thread.waiting < self.batch:
            thread.waiting_since_ns = closed_ns
        elif thread.waiting >= self.batch or closed_ns - thread.waiting_since_ns > BATCH_NS:
            self.resolve(thread)

    def resolve(self, thread: Thread) -> None:
        """Resolve what the device has finished of the calling thread's steps, unless another thread is about it."""
        if thread.busy:
            return
        with thread.lock:
            try:
                thread.busy = True
                thread.waiting = 0
                self._resolver.resolve(thread, BATCH)
            except Exception:
                self.own_fault()
            finally:
                thread.busy = False

    def send(self, frame: frames.Frame, dropped: dict[str, int] | None = None) -> None:
        """Send a frame that comes from elsewhere than a step; `dropped` are the counts in it, if any."""
        self.channel.send(frames.encode(frame), dropped or {})

    def describe(self, rank: Rank, attributes: dict[str, frames.AttributeValue]) -> None:
        """Say once what is true of all steps of a rank."""
        self._places[rank.number] = attributes
        self.channel.greet_again()

    def device_settled(self) -> None:
        """The relay is told, and whoever reads the log; looks at the device's clock begin."""
        self.idle.new_device()
        self.channel.greet_again()

    # Lifecycle.

    def stand_by(self) -> None:
        """Capture nothing before somebody wants it. The relay is told who this is."""
        self.on, self.was_switched = False, True
        self.send(frames.Switched(self.on))

    def obey(self, *, on: bool) -> None:
        """Somebody wants capture on or off: the relay is told what became of it."""
        self.was_switched = True
        self.on = self._switch(self, on)
        self.send(frames.Switched(self.on))

    def stop_capture(self) -> None:
        """Capture nothing from now on, without waiting; what is captured is still resolved and sent."""
        self.on = False
        self._turn_off(self)

    def flush(self, timeout_seconds: float) -> bool:
        """Resolve and export what was captured so far; whether all of it was, in time."""
        deadline = time.monotonic() + timeout_seconds
        # One at a time; another thread's may be allowed to wait much longer than this one.
        if not self._flush_lock.acquire(timeout=min(max(0.0, timeout_seconds), _LONGEST_WAIT)):
            return False
        try:
            return self._flush_until(deadline)
        finally:
            self._flush_lock.release()

    def _flush_until(self, deadline: float) -> bool:
        self.idle.flushing = True
        try:
            while not self._resolved_and_sent():
                if time.monotonic() >= deadline:
                    return False
                # By the idle thread: to read a device's events the caller would have to change its own device.
                self.idle.wake()
                time.sleep(0.001)
        finally:
            self.idle.flushing = False
        number = next(self._flushes)
        left_seconds = deadline - time.monotonic()
        self.channel.send(frames.encode(frames.Flush(number, min(max(0.0, left_seconds), _LONGEST_WAIT))))
        while (left_seconds := deadline - time.monotonic()) > 0:
            answer = self.channel.receive(left_seconds)
            if not answer:
                return False
            flushed = frames.decode_flushed(answer)
            if flushed.number == number:
                return flushed.complete and not self._lost_since_last_time()
        return False

    def _lost_since_last_time(self) -> bool:
        """Whether something that was captured was lost on its way to the relay since the flush before."""
        before, self._lost = self._lost, self.drops.lost
        return self._lost > before

    def _resolved_and_sent(self) -> bool:
        self.channel.send_deferred()
        self.channel.drain()
        # In this order: what is not pending any more may still be on its way.
        return (
            self.channel.connected
            and not any(thread.pending for thread in list(self.threads))
            and not any(thread.busy for thread in list(self.threads))
            and self.channel.empty
        )

    def close(self, timeout_seconds: float = EXIT_SECONDS) -> None:
        """Flush, then let the relay go. Waits at most this long."""
        deadline = time.monotonic() + timeout_seconds
        if not self._link.failing:
            self.flush(timeout_seconds)
        self.running = False
        self.idle.log_drops()
        self.idle.stop(max(0.0, deadline - time.monotonic()))
        self._link.close(max(0.0, deadline - time.monotonic()))
        for thread in list(self.threads):  # what the device has not finished; the next recorder needs the events
            self._let_go(thread)

    def _let_go(self, thread: Thread, but: int = 0) -> None:
        """Give the newest steps up, but for so many older ones."""
        while len(thread.pending) > but:
            try:
                step = thread.pending.pop()
            except IndexError:  # another thread is about it
                return
            give_up(step, self.drops)
            step.stages = []

    def abandon(self) -> None:
        """In a forked child: let go of the parent's connection, without a word and without its locks."""
        self.running = False
        self.drops = Drops()
        for thread in self.threads:
            thread.lock = threading.RLock()
        self.channel.abandon()

    def _hello(self) -> frames.Hello:
        return frames.Hello(
            protocol=frames.PROTOCOL,
            pid=os.getpid(),
            host=socket.gethostname(),
            instance_id=self._instance_id,
            executable=_utf8(sys.executable or ""),
            service_name=_utf8(os.environ.get("OTEL_SERVICE_NAME", "")),
            resource_attributes=_utf8(os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")),
            # A front end or a scheduler uses none; whoever does settles the question with its first step.
            device_kind="" if self.device_is_open_question else self.device.kind,
            device_name=self._device_name(),
            device_resolution_ns=self.device.resolution_ns,
            slow_step=self.settings.slow_step,
            on=self.on,
            places=self._places,
        )

    def _device_name(self) -> str:
        try:
            return self.device.name(0)
        except Exception:
            return ""


def _utf8(text: str) -> str:
    """Text of the environment, which may be any bytes, as text that can be sent."""
    return os.fsencode(text).decode(errors="replace")
