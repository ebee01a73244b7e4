"""What one traced process has: its device, its threads' states, its channel to the relay, and one idle thread."""

from __future__ import annotations

import itertools
import logging
import os
import socket
import sys
import threading
import time
import uuid
from typing import TYPE_CHECKING, Any, Final

from otel_npu import devices, semconv
from otel_npu.capture import context, hang
from otel_npu.capture.resolver import Resolver, give_up
from otel_npu.capture.steps import MAX_PENDING, Step, ThreadState
from otel_npu.devices.cpu import Cpu
from otel_npu.devices.pair import Pool
from otel_npu.drops import REPORT_SECONDS, Drops
from otel_npu.wire import frames
from otel_npu.wire.channel import Channel
from otel_npu.wire.link import RelayLink

if TYPE_CHECKING:
    from otel_npu.devices import Device
    from otel_npu.settings import Settings

_log = logging.getLogger("otel_npu")

IDLE_SECONDS: Final = 0.02
EXIT_SECONDS: Final = 2.0
# At a step boundary the model's thread resolves at most so many steps: one for the step just closed, and some to
# catch up after the device has been behind.
_STEPS_PER_BOUNDARY: Final = 4
_STEPS_PER_TICK: Final = 64
_WATCH_SECONDS: Final = 1.0
_LONGEST_WAIT: Final = 3600.0
_PING_BUDGET_NS: Final = 100_000


class Local(threading.local):
    """Gives each thread its state when it first asks for it."""

    def __init__(self, recorder: Recorder) -> None:
        self.state = ThreadState(recorder)


class Recorder:
    """Captures stages and steps, resolves them, and sends them.

    Args:
        settings: What was chosen.
        device: The device to record on; None finds it by the settings once the program has initialised it.
    """

    def __init__(self, settings: Settings, device: Device | None = None) -> None:
        self.settings = settings
        self.drops = Drops()
        self.step_numbers = itertools.count(1)
        self.device: Device = device or Cpu()
        self.device_is_open_question = device is None
        self.running = True
        self._states: list[ThreadState] = []
        self._lock = threading.Lock()
        self._limiter = context.Limiter(settings.steps_per_second)
        self._instance_id = str(uuid.UUID(bytes=os.urandom(16), version=4))
        self._channel = Channel(self._hello, self.drops)
        self._resolver = Resolver(self._channel, self.drops, log_stages=settings.log_stages)
        self._link = RelayLink(self._channel, settings, self.drops)
        self._flushes = itertools.count(1)
        self._flush_lock = threading.Lock()
        self._flushing = False
        self._pinged = 0
        """How many devices have been pinged."""
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._idle_since: dict[ThreadState, int] = {}
        self._next_drop_line = time.monotonic() + REPORT_SECONDS
        self.local = Local(self)
        self._thread = threading.Thread(target=self._run, name="otel-npu", daemon=True)
        self._thread.start()

    # Called from the hot path.

    def adopt(self, state: ThreadState) -> None:
        """A thread captures for the first time."""
        with self._lock:
            self._states.append(state)

    def pool(self, device_index: int) -> Pool:
        """The event pairs of this device."""
        with self._lock:
            pool = self.device.pools.get(device_index)
            if pool is None:
                pool = self.device.pools[device_index] = Pool(self.device, device_index)
        return pool

    def choose(self, step: Step) -> context.Ids | None:
        """Ids for a step, and whether it is kept as a trace; None for one that never is: only its times count."""
        outer = step.outer
        if outer is not None:
            around = outer.ids
            if around is None or not around.trace_id:
                return None
            return context.child_of(around.trace_id, around.span_id, kept=around.kept)
        active = context.active_span()
        if active is not None:
            if not active.trace_flags & context.SAMPLED:
                return None
            ids = active.trace_id.to_bytes(16, "big"), active.span_id.to_bytes(8, "big")
            return context.child_of(*ids, kept=self._limiter.allow(step.kind))
        return context.new_root(kept=self._limiter.allow(step.kind)) if self.settings.root_traces else None

    def send(self, frame: frames.Frame, dropped: dict[str, int] | None = None) -> None:
        """Send a frame that comes from elsewhere than a step; `dropped` are the counts in it, if any."""
        self._channel.send(frames.encode(frame), dropped or {})

    def step_closed(self, state: ThreadState, step: Step) -> None:
        """A step boundary: the step waits for the device; older ones that it has finished are resolved."""
        if not self.running:  # closed, or a forked child's parent's: nobody resolves or sends any more
            give_up(step, self.drops)
            step.stages = []
            return
        if len(state.pending) >= MAX_PENDING:
            self.drops.add(semconv.BACKLOG_FULL)
            give_up(step, self.drops)
            step.stages = []
            return
        state.pending.append(step)
        state.boundaries += 1
        if state.lock.acquire(blocking=False):
            try:
                self._resolver.resolve(state, _STEPS_PER_BOUNDARY)
            except Exception:
                self.own_fault()
            finally:
                state.lock.release()

    def settle_device(self) -> None:
        """Look again for the device, as long as the program has not initialised it."""
        try:
            device = devices.find(self.settings.device)
        except Exception as error:
            _log.error("OTEL_NPU_DEVICE=%r: %s; tracing is off", self.settings.device, error)
            self.device_is_open_question = False
            self.stop_capture()
            return
        if device is None:
            return
        self.device = device
        self._pinged = 0
        self.device_is_open_question = False
        self._channel.greet_again()
        with self._lock:
            states = list(self._states)
        for state in states:
            state.use_device()

    def stop_for_the_models_error(self) -> None:
        """`record()` raised: torch hands a failed launch to whoever enqueues next. It goes on to the model."""
        _log.warning(
            "recording an event raised the error of an earlier launch, or the device's own; it is passed on to "
            "the program, and tracing is off from here"
        )
        self.stop_capture()

    def own_fault(self) -> None:
        """A fault of ours, which is being handled: counted, for whoever debugs, and never the program's."""
        self.drops.add(semconv.INTERNAL_ERROR)
        _log.debug("a fault of otel-npu's own; the program is not affected", exc_info=True)

    # Lifecycle.

    def stop_capture(self) -> None:
        """Capture nothing from now on, without waiting; what is captured is still resolved and sent."""
        from otel_npu.capture import switch

        switch.turn_off(self)

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
        self._flushing = True
        try:
            while not self._resolved_and_sent():
                if time.monotonic() >= deadline:
                    return False
                # By the idle thread: to read a device's events the caller would have to change its own device.
                self._wake.set()
                time.sleep(0.001)
        finally:
            self._flushing = False
        number = next(self._flushes)
        left_seconds = deadline - time.monotonic()
        self._channel.send(frames.encode(frames.Flush(number, min(max(0.0, left_seconds), _LONGEST_WAIT))))
        while (left_seconds := deadline - time.monotonic()) > 0:
            answer = self._channel.receive(left_seconds)
            if not answer:
                return False
            flushed = frames.decode_flushed(answer)
            if flushed.number == number:
                return flushed.complete
        return False

    def close(self, timeout_seconds: float = EXIT_SECONDS) -> None:
        """Flush, then let the relay go. Waits at most this long."""
        deadline = time.monotonic() + timeout_seconds
        if not self._link.failing:
            self.flush(timeout_seconds)
        self.running = False
        self._log_drops()
        self._stop.set()
        self._wake.set()
        self._thread.join(max(0.0, deadline - time.monotonic()))
        self._link.close(max(0.0, deadline - time.monotonic()))
        with self._lock:
            states = list(self._states)
        for state in states:  # what the device has not finished by now; the next recorder needs the events
            with state.lock:
                while state.pending:
                    give_up(state.pending.popleft(), self.drops)

    def abandon(self) -> None:
        """In a forked child: let go of the parent's connection, without a word and without its locks."""
        self.running = False
        self.drops = Drops()
        self._channel.abandon()

    # The idle thread.

    def _run(self) -> None:
        next_watch = 0.0
        while True:
            try:
                self._link.keep()
                self._resolve_idle()
                self._channel.drain()
                if time.monotonic() >= next_watch:
                    next_watch = time.monotonic() + _WATCH_SECONDS
                    self._watch()
                    self._ping()
                elif len(self.device.pools) > self._pinged:
                    self._ping()  # a device just taken into use: its clock is wanted for the first steps already
            except Exception:
                self.own_fault()
            self._wake.wait(IDLE_SECONDS)
            self._wake.clear()
            if self._stop.is_set():
                return

    def _resolve_idle(self) -> None:
        """Resolve for the threads that closed no step since the last time; to flush, for all."""
        with self._lock:
            states = list(self._states)
        for state in states:
            if state.pending and (self._flushing or self._idle_since.get(state) == state.boundaries):
                self._resolve_for(state)
            self._idle_since[state] = state.boundaries

    def _resolve_for(self, state: ThreadState) -> None:
        if state.lock.acquire(blocking=False):
            try:
                self._adopt_thread_for(state)
                self._resolver.resolve(state, _STEPS_PER_TICK)
            finally:
                state.lock.release()

    def _adopt_thread_for(self, state: ThreadState) -> None:
        """Make the idle thread fit for the events of the step that is next to be resolved."""
        step = state.pending[0] if state.pending else state.step
        for stage in step.stages if step is not None else ():
            if stage.pair is not None:
                stage.pair.pool.device.adopt_thread(stage.pair.pool.device_index)
                return

    def _resolved_and_sent(self) -> bool:
        with self._lock:
            states = list(self._states)
        self._channel.drain()
        return self._channel.connected and self._channel.empty and all(map(_resolved, states))

    def _watch(self) -> None:
        with self._lock:
            states = list(self._states)
            # A thread that has ended and left nothing behind is forgotten.
            self._states = [state for state in states if state.pending or _alive(state)]
            kept = set(map(id, self._states))
        for state in states:
            if id(state) not in kept:
                self._idle_since.pop(state, None)
            elif state.lock.acquire(blocking=False):
                try:
                    self._adopt_thread_for(state)
                    hang.watch(state, self.settings, self._channel, self.drops)
                except Exception:
                    self.own_fault()
                finally:
                    state.lock.release()
        if time.monotonic() >= self._next_drop_line:
            self._next_drop_line = time.monotonic() + REPORT_SECONDS
            self._log_drops()

    def _log_drops(self) -> None:
        line = self.drops.take_line()
        if line:
            _log.warning("left out in the last minute: %s", line)

    def _ping(self) -> None:
        """Look at the clock of each device that is in use."""
        with self._lock:
            pools = list(self.device.pools.values())
            states = list(self._states)
        # Not while a thread captures a graph: nobody knows what a driver makes of other work meanwhile.
        if not pools or any(
            state.stream_key is not None and self.device.captured(state.stream_key) for state in states
        ):
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
                self.drops.add(semconv.PING_UNANSWERED)
            else:
                self._channel.send(frames.encode(frames.Ping(pool.device_index, *ping)))

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
        )

    def _device_name(self) -> str:
        try:
            return self.device.name(0)
        except Exception:
            return ""


def _utf8(text: str) -> str:
    """Text of the environment, which may be any bytes, as text that can be sent."""
    return os.fsencode(text).decode(errors="replace")


def _resolved(state: ThreadState) -> bool:
    """Whether nothing is pending; a step that is being resolved just now is, though no longer in the queue."""
    if not state.lock.acquire(blocking=False):
        return False
    try:
        return not state.pending
    finally:
        state.lock.release()


def _alive(state: ThreadState) -> bool:
    thread: Any = state.thread()
    return thread is not None and thread.is_alive()
