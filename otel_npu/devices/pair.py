"""The pair of events that times one stage, and the bounded pool that it comes from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from otel_npu.devices import Device


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
        self._made = 0

    def grow(self) -> Pair | None:
        """One more pair, or None when the bound is reached."""
        if self._made >= self.device.pool_pairs:
            return None
        self._made += 1
        return Pair(self, self.device.new_event(self.device_index), self.device.new_event(self.device_index))
