"""What a kind of device answers to, the pairs of events that time stages on it, their bounded pool, and its streams."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Any, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from otel_npu.devices.ping import Ping


_log = logging.getLogger("otel_npu")


class Device(Protocol):
    """One kind of device; a process may use several of a kind, told apart by their index."""

    kind: str
    """The torch device type, or `cpu` or `simulated`."""

    host_clock: bool
    """Whether its times are the host's own: then nothing has to be placed."""

    resolution_ns: int
    """A device time stands for an instant in [time, time + resolution)."""

    pools: dict[int, Pool]
    """Its event pairs, by device index. They live as long as it does: to destroy an event is work for the device."""

    pool_pairs: int
    """How many event pairs may exist on each device; far below the event ids that the hardware has."""

    def current_stream_key(self) -> Any:
        """What tells the calling thread's current stream from any other, of any device. Called for every stage."""

    def current_stream(self) -> Any:
        """That stream, with `device_index` and `stream_id`."""

    def capturing(self) -> bool:
        """Whether the current stream is being captured into a graph. Asked on side streams only."""

    def new_event(self, device_index: int, /) -> Any:
        """An event with timing, with `record(stream)`, `query()` and `synchronize()`; None if the device makes none."""

    def read(self, device_index: int, pairs: Sequence[Pair], /) -> list[tuple[int, int]]:
        """Start and duration of each pair, all of this device and done, in nanoseconds of the device's own clock.

        Raises:
            OSError, RuntimeError: The device's times can't be read.
        """

    def made(self, event: Any, /) -> bool:
        """Whether an event whose record has failed exists: it is made at its first record, which may be refused.

        Then the failure is ours alone. Any other may be the model's.
        """

    def adopt_thread(self, device_index: int, /) -> None:
        """Make the calling thread fit to query and read events of this device."""

    def ping(self, device_index: int, budget_ns: int, /) -> Ping | None:
        """What the device's clock shows now; None if that can't be had within the budget.

        Called by one thread, which has been adopted.

        Raises:
            OSError, RuntimeError: The device reports an error.
        """

    def captured(self, stream_key: Any, /) -> bool:
        """Whether a graph is being captured, on the stream with this key or on the usual one. As for `ping`."""

    def name(self, device_index: int, /) -> str:
        """The device's model, or an empty string."""


class Pair:
    """A start and an end event of one device. Reused, never destroyed: destroying one is work for the device."""

    __slots__ = ("end", "handles", "pool", "record_end", "record_start", "start")

    def __init__(self, pool: Pool, start: Any, end: Any) -> None:
        self.pool = pool
        self.start = start
        self.end = end
        self.record_start = start.record
        self.record_end = end.record
        self.handles: Any = None
        """Raw handles, cached by the device that reads them; they exist from the first record on."""

    def replace_start(self, event: Any) -> None:
        """Start with another event from now on."""
        self.start = event
        self.record_start = event.record


class Pool:
    """The event pairs of one device: grows when none is free, up to the device's bound, and never shrinks."""

    def __init__(self, device: Device, device_index: int) -> None:
        self.device = device
        self.device_index = device_index
        self.free: list[Pair] = []
        """Pairs not in use. `pop` and `append` are atomic, so threads share it without a lock."""
        self.closed = False
        """Whether no more may be made: the device has refused one."""
        self.pairs: list[Pair] = []
        """All that were made."""

    def grow(self) -> Pair | None:
        """One more pair, or None when the bound is reached or the device makes none."""
        if self.closed or len(self.pairs) >= self.device.pool_pairs:
            return None
        start, end = self.device.new_event(self.device_index), self.device.new_event(self.device_index)
        if start is None or end is None:
            self.close()
            return None
        pair = Pair(self, start, end)
        self.pairs.append(pair)
        return pair

    def close(self) -> None:
        """The device makes no more events: those that there are have to do."""
        if not self.closed:
            self.closed = True
            _log.warning("the device makes no more events; stages without a free one are timed by the host")

    def reclaim(self) -> None:
        """Take back what nobody holds: a signal handler raised while a stage took it, or gave it back."""
        if self.free or len(self.pairs) < self.device.pool_pairs:
            return
        self.free.extend(
            self.pairs[index] for index in range(len(self.pairs)) if _holders(self.pairs, index) <= _NOBODY
        )


def _holders(pairs: list[Any], index: int) -> int:
    pair = pairs[index]
    return sys.getrefcount(pair)


_NOBODY: Final = _holders([object()], 0)


class Stream:
    """A stream on which stages were seen.

    Attributes:
        handle: What events are recorded on.
        device_index: Its device.
        stream_id: What tells it from the device's other streams.
        side: Whether it can be captured into a graph: torch refuses to capture the default stream.
        timed: Whether stages on it are timed by events: on the host the host's clock does.
        pool: The event pairs of its device.
        free: Those of them that are not in use.
    """

    __slots__ = ("device_index", "free", "handle", "pool", "side", "stream_id", "timed")

    def __init__(self, handle: Any, pool: Pool) -> None:
        self.handle = handle
        self.device_index: int = handle.device_index
        self.stream_id: int = handle.stream_id
        self.side = self.stream_id != 0
        self.timed = not pool.device.host_clock
        self.pool = pool
        self.free = pool.free
