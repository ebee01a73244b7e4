"""An NPU in pure Python: in-order streams on a virtual timeline, with a clock of its own.

For the demo, and for tests that want a device whose truth is known. It computes nothing and needs no torch.
"""

from __future__ import annotations

import functools
import threading
import time
from typing import TYPE_CHECKING, Final

from otel_npu.devices.ping import Ping, ping

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from otel_npu.devices.device import Pair, Pool

_TICK_NS: Final = 20  # the 50 MHz timestamps of an Ascend 910B


class SimulatedStream:
    """Work in order: each piece starts when it is launched and everything before it is done.

    Attributes:
        busy_until_ns: Host time at which all that has been launched so far is done.
    """

    def __init__(self, device_index: int, stream_id: int) -> None:
        self.device_index = device_index
        self.stream_id = stream_id
        self.busy_until_ns = 0
        self.capturing = False


class SimulatedEvent:
    """Records the instant at which its stream gets to it."""

    __slots__ = ("_now", "reached_ns")

    def __init__(self, now: Callable[[], int]) -> None:
        self._now = now
        self.reached_ns = 0

    def record(self, stream: SimulatedStream) -> None:
        """Mark the end of what has been launched on the stream so far."""
        self.reached_ns = max(stream.busy_until_ns, self._now())

    def query(self) -> bool:
        """Whether the stream has got to it."""
        return self._now() >= self.reached_ns

    def synchronize(self) -> None:
        """Wait until the stream has got to it."""
        _wait_until(self._now, self.reached_ns)


class SimulatedNpu:
    """`Device` with a clock that is off by `offset_ns` and drifts by `drift_ppm` from the host's.

    Args:
        now: The host's monotonic clock in nanoseconds; a test passes a fake one.
        offset_ns: Device time minus host time at the start.
        drift_ppm: How much faster the device's clock runs, in parts per million.
    """

    kind = "simulated"
    host_clock = False
    resolution_ns = _TICK_NS
    pool_pairs = 1024

    def __init__(
        self,
        now: Callable[[], int] = time.perf_counter_ns,
        *,
        offset_ns: int = 123_456_789_000,
        drift_ppm: float = 12.0,
    ) -> None:
        self.now = now
        self.pools: dict[int, Pool] = {}
        self._started_ns = now()
        self._offset_ns = offset_ns
        self._drift = drift_ppm * 1e-6
        self._streams_made = 0
        self.default_stream = self.new_stream()
        self._ping_stream = SimulatedStream(0, -1)
        self._current = threading.local()
        self.current_stream = self.current_stream_key = self._current_stream

    def new_stream(self, device_index: int = 0) -> SimulatedStream:
        """One more stream."""
        self._streams_made += 1
        return SimulatedStream(device_index, self._streams_made - 1)

    def use(self, stream: SimulatedStream) -> None:
        """Make this the calling thread's current stream."""
        self._current.stream = stream

    def launch(self, duration_ns: int) -> None:
        """Put a kernel of this length on the current stream."""
        stream = self._current_stream()
        stream.busy_until_ns = max(stream.busy_until_ns, self.now()) + duration_ns

    def synchronize(self) -> None:
        """Wait until the current stream has done all its work, as reading a result would."""
        _wait_until(self.now, self._current_stream().busy_until_ns)

    def device_time(self, host_ns: int) -> int:
        """The device's clock in nanoseconds at an instant of the host's: the truth behind `read`."""
        elapsed_ns = host_ns - self._started_ns
        ns = host_ns + self._offset_ns + round(elapsed_ns * self._drift)
        return ns - ns % _TICK_NS

    def new_event(self, _device_index: int) -> SimulatedEvent:
        """An event on this timeline."""
        return SimulatedEvent(self.now)

    def capturing(self) -> bool:
        """Whether the current stream is being captured."""
        return self._current_stream().capturing

    def made(self, _event: object) -> bool:
        """They exist from the start."""
        return True

    def adopt_thread(self, _device_index: int) -> None:
        """Any thread may read it."""

    def ping(self, _device_index: int, budget_ns: int) -> Ping | None:
        """The device's clock, from an event on a stream of its own."""
        event = self.new_event(0)
        return ping(
            lambda: event.record(self._ping_stream),
            event.query,
            lambda: self.device_time(event.reached_ns),
            budget_ns,
            self.now,
        )

    def captured(self, stream_key: SimulatedStream) -> bool:
        """Whether this stream is being captured."""
        return stream_key.capturing

    def name(self, _device_index: int) -> str:
        """Not a chip that exists."""
        return "SimulatedNPU"

    def read(self, _device_index: int, pairs: Sequence[Pair]) -> list[tuple[int, int]]:
        """Start and duration of each pair, in nanoseconds of the device's clock, in ticks of 20."""
        times = []
        for pair in pairs:
            start_ns = self.device_time(pair.start.reached_ns)
            times.append((start_ns, self.device_time(pair.end.reached_ns) - start_ns))
        return times

    def _current_stream(self) -> SimulatedStream:
        return getattr(self._current, "stream", self.default_stream)


@functools.cache
def default_device() -> SimulatedNpu:
    """The one that `OTEL_NPU_DEVICE=simulated` uses."""
    return SimulatedNpu()


def _wait_until(now: Callable[[], int], instant_ns: int) -> None:
    while (left_ns := instant_ns - now()) > 0:
        time.sleep(left_ns / 1e9)
