"""What all stages and steps of a process share while tracing is on, and what each thread has of its own."""

from __future__ import annotations

import itertools
import logging
import sys
import threading
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any, Final

from otel_npu import devices, semconv
from otel_npu.capture import context
from otel_npu.capture.records import BATCH, CaptureRecord, ThreadRecord
from otel_npu.devices.cpu import Cpu
from otel_npu.devices.device import Pool, Stream
from otel_npu.drops import Drops
from otel_npu.interrupts import from_outside

if TYPE_CHECKING:
    from otel_npu.devices.device import Device
    from otel_npu.settings import Settings

_log = logging.getLogger("otel_npu")

_MAX_STREAMS: Final = 1024


class Thread(ThreadRecord):
    """One thread's steps, from the first on."""

    __slots__ = ()

    def __init__(self) -> None:
        self.thread = weakref.ref(threading.current_thread())
        self.open = {}
        self.pending = deque()
        self.waiting = self.waiting_since_ns = 0
        self.busy = False
        self.lock = threading.RLock()

    @property
    def alive(self) -> bool:
        """Whether the thread runs still."""
        thread: Any = self.thread()
        return thread is not None and thread.is_alive()


class _Local(threading.local):
    """Gives each thread its own when it first asks for it."""

    def __init__(self, threads: list[Thread]) -> None:
        self.thread = Thread()
        threads.append(self.thread)


class Capture(CaptureRecord):
    """What stages and steps need of the process that they are in.

    Args:
        settings: What was chosen.
        device: The device to record on; None finds it by the settings once the program has initialised it.
    """

    def __init__(self, settings: Settings, device: Device | None = None) -> None:
        self.settings = settings
        self.drops = Drops()
        self.step_numbers = itertools.count(1)
        self.running = True
        self.on = True
        """Whether anything is captured: not while somebody at the relay wants it off."""
        self.was_switched = False
        """Whether it ever was off: a step's engine may have been, a moment longer than its worker."""
        self.threads: list[Thread] = []
        self.local = _Local(self.threads)
        self.root_traces = settings.root_traces
        self.limiter = context.Limiter(settings.steps_per_second)
        self.device_is_open_question = device is None
        self.use_device(device or Cpu())

    # What becomes of what is captured: for whoever resolves it.

    def step_closed(self, thread: Thread, closed_ns: int) -> None:
        """A step boundary: one more of the thread's steps waits for the device."""
        raise NotImplementedError

    def device_settled(self) -> None:
        """It is known now on which device the program works."""

    def stop_capture(self) -> None:
        """Capture nothing from now on, without waiting; what is captured is still resolved and sent."""
        raise NotImplementedError

    def obey(self, *, on: bool) -> None:
        """Capture again, or capture nothing for the moment."""
        raise NotImplementedError

    # Devices and streams.

    def use_device(self, device: Device) -> None:
        """Record on this device from now on."""
        self.streams = {}
        self.device: Device = device
        self.current_stream_key = device.current_stream_key
        # A batch holds on to its events, of which there may be few.
        self.batch = min(BATCH, device.pool_pairs // 4)

    def stream(self) -> Stream:
        """The calling thread's current stream, which was not seen before."""
        key = self.current_stream_key()
        handle = self.device.current_stream()
        if len(self.streams) >= _MAX_STREAMS:
            self.streams.clear()
        stream = self.streams[key] = Stream(handle, self.pool(handle.device_index))
        return stream

    def pool(self, device_index: int) -> Pool:
        """The event pairs of this device."""
        pools = self.device.pools
        return pools.get(device_index) or pools.setdefault(device_index, Pool(self.device, device_index))

    def settle_device(self) -> None:
        """Look again for the device, as long as the program has not initialised it."""
        try:
            device = devices.find(self.settings.device)
        except Exception as error:
            if from_outside(error):
                raise
            _log.error("OTEL_NPU_DEVICE=%r: %s; tracing is off", self.settings.device, error)
            self.device_is_open_question = False
            self.stop_capture()
            return
        if device is None:
            return
        self.use_device(device)
        self.device_is_open_question = False
        self.device_settled()

    # Faults.

    def stop_for_the_models_error(self) -> None:
        """`record()` raised: torch hands a failed launch to whoever enqueues next. It goes on to the model."""
        _log.warning(
            "recording an event raised the error of an earlier launch, or the device's own; it is passed on to "
            "the program, and tracing is off from here"
        )
        self.stop_capture()

    def own_fault(self) -> None:
        """A fault of ours, which is being handled: counted, and never the program's.

        It may be the program's all the same: an exception out of a signal handler that ran in the midst of our lines.
        Then it goes on.
        """
        if from_outside(sys.exc_info()[1]):
            # In no variable: the frames that it passed through would keep themselves, and what is open in them.
            raise  # noqa: PLE0704
        self.count_fault(sys.exc_info()[1])

    def count_fault(self, error: BaseException | None) -> None:
        """Count a fault of ours, for whoever debugs."""
        self.drops.add(semconv.INTERNAL_ERROR)
        _log.debug("a fault of otel-npu's own; the program is not affected", exc_info=error)
