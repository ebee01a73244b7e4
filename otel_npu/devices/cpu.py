"""The host itself: its work is synchronous, so the host's clock measures it."""

from __future__ import annotations

from itertools import repeat
from time import perf_counter_ns
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

    from otel_npu.devices.device import Pair, Pool


class HostStream:
    """The only stream of the host."""

    device_index = 0
    stream_id = 0
    side = False
    timed = False
    """By no event: nothing is to be waited for."""


HOST_STREAM: Final = HostStream()


class HostEvent:
    """Done as soon as it is recorded."""

    __slots__ = ("time_ns",)

    def __init__(self) -> None:
        self.time_ns = 0

    def record(self, _stream: object) -> None:
        """Take the time."""
        self.time_ns = perf_counter_ns()

    def query(self) -> bool:
        """Host work is done when the call returns."""
        return True

    def synchronize(self) -> None:
        """Nothing to wait for."""


class Cpu:
    """`Device` on the host's monotonic clock."""

    kind = "cpu"
    host_clock = True
    resolution_ns = 1
    pool_pairs = 1024

    def __init__(self) -> None:
        self.pools: dict[int, Pool] = {}
        self.current_stream = self.current_stream_key = repeat(HOST_STREAM).__next__  # without an interpreter

    def new_event(self, _device_index: int) -> HostEvent:
        """An event on the host's clock."""
        return HostEvent()

    def capturing(self) -> bool:
        """The host captures no graphs."""
        return False

    def made(self, _event: object) -> bool:
        """The host's events need nothing."""
        return True

    def adopt_thread(self, _device_index: int) -> None:
        """Any thread may read the host's clock."""

    def ping(self, _device_index: int, _budget_ns: int) -> None:
        """Nothing to ask for: its clock is the host's."""

    def captured(self, _stream_key: object) -> bool:
        """The host captures no graphs."""
        return False

    def name(self, _device_index: int) -> str:
        """The host's model is the resource's business, not the device's."""
        return ""

    def read(self, _device_index: int, pairs: Sequence[Pair]) -> list[tuple[int, int]]:
        """Start and duration of each pair in nanoseconds of the host's monotonic clock."""
        return [(pair.start.time_ns, pair.end.time_ns - pair.start.time_ns) for pair in pairs]
