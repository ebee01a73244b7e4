"""From the host's monotonic clock to Unix time, by an offset that is sampled again every second."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

_SAMPLE_NS: Final = 1_000_000_000
_TRIES: Final = 5


class WallClock:
    """Unix time of monotonic instants. NTP may slew or step it: what is placed later follows.

    Args:
        monotonic: The host's monotonic clock in nanoseconds.
        unix: The host's wall clock in nanoseconds.
    """

    def __init__(
        self, monotonic: Callable[[], int] = time.perf_counter_ns, unix: Callable[[], int] = time.time_ns
    ) -> None:
        self._monotonic = monotonic
        self._unix = unix
        self._offset_ns = 0
        self._next_sample_ns = -1

    def offset_ns(self) -> int:
        """Unix time minus monotonic time. Take it once for all spans of a step, so that they stay together."""
        now_ns = self._monotonic()
        if now_ns >= self._next_sample_ns:
            self._offset_ns = self._sample()
            self._next_sample_ns = now_ns + _SAMPLE_NS
        return self._offset_ns

    def _sample(self) -> int:
        """The sample with the least time between its two readings of the monotonic clock."""
        best_ns = offset_ns = -1
        for _ in range(_TRIES):
            before_ns = self._monotonic()
            unix_ns = self._unix()
            took_ns = self._monotonic() - before_ns
            if best_ns < 0 or took_ns < best_ns:
                best_ns, offset_ns = took_ns, unix_ns - before_ns - took_ns // 2
        return offset_ns
