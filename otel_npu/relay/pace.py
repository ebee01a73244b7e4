"""When the relay looks into its sockets: seldom enough to cost next to nothing, in time for what it promises."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

SHORTEST_SECONDS: Final = 0.005
FIRST_SECONDS: Final = 0.05
LONGEST_SECONDS: Final = 0.2
_LENGTHENS: Final = 1.25
PACKETS_A_LOOK: Final = 8
"""So many of one client's packets shall have come since the last look; a stock socket holds 98 of 2 kB."""
_EMPTY_LOOKS: Final = 3
_ALONE_SECONDS: Final = 0.2


class Pace:
    """For how long to leave the senders alone.

    A packet that comes while the relay waits for it makes the sender wake it: up to 30 us in the model's thread, more
    than sending. So while packets come the relay looks by itself, the more rarely the fewer they are. When little
    comes it waits, and is woken: that costs less than looking for nothing again and again. A packet that comes
    alone, as an idle worker's look at its clock does, is no reason to look for more.

    The longer it goes on, the more rarely it looks: what is read and made together is cheaper, because all but the
    first of it finds its code in the processor's caches. Whoever has just begun, or asks once, is heard sooner.

    Args:
        now: Seconds that go on by themselves.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._seconds = FIRST_SECONDS
        self._empty = _EMPTY_LOOKS + 1
        self._last = -_ALONE_SECONDS

    def pause(self, packets: int) -> float | None:
        """Seconds until the next look; None to wait in the sockets.

        Args:
            packets: The most that one client had sent since the last look.
        """
        if packets:
            now, last = self._now(), self._last
            self._last = now
            if self._empty > _EMPTY_LOOKS and packets == 1 and now - last >= _ALONE_SECONDS:
                return None
            self._empty = 0
            wanted = self._seconds * PACKETS_A_LOOK / packets
            self._seconds = min(max(wanted, SHORTEST_SECONDS), self._seconds * _LENGTHENS, LONGEST_SECONDS)
            return self._seconds
        self._empty += 1
        if self._empty <= _EMPTY_LOOKS:
            return max(self._seconds, FIRST_SECONDS)
        self._seconds = FIRST_SECONDS
        return None
