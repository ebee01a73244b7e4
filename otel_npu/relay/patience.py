"""For how long something has been waited for: what the deadlines of a relay count."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from otel_npu.wire import frames

if TYPE_CHECKING:
    from collections.abc import Callable

LATE_NS: Final = 200_000_000
LONGEST_TURN: Final = 0.1
BEHIND: Final = 0.1


class Patience:
    """Seconds for which something could have been read and was not.

    While frames are read long after they were sent, what is waited for may be among those that are not read yet. So
    it goes slowly then: a relay that gets too little of the processor is late, but not wrong.

    Args:
        now_ns: The host's monotonic clock, in nanoseconds: the one by which all senders, on this host, time frames.
    """

    def __init__(self, now_ns: Callable[[], int] = time.perf_counter_ns) -> None:
        self._now_ns = now_ns
        self._seconds = 0.0
        self._at_ns = now_ns()
        self._late = False

    def __call__(self) -> float:
        """How much has been counted so far."""
        return self._seconds

    def read(self, frame: frames.Frame) -> None:
        """A frame was read."""
        sent_ns = _sent_ns(frame)
        if sent_ns is not None and self._now_ns() - sent_ns > LATE_NS:
            self._late = True

    def turn(self) -> None:
        """What was there has been read."""
        now_ns = self._now_ns()
        # In a turn that took long, what came meanwhile is still unread.
        self._seconds += min((now_ns - self._at_ns) * 1e-9, LONGEST_TURN) * (BEHIND if self._late else 1.0)
        self._at_ns, self._late = now_ns, False


def _sent_ns(frame: frames.Frame) -> int | None:
    """When it was sent, if it says so."""
    if isinstance(frame, frames.Step):
        return frame.seen_ns
    if isinstance(frame, frames.Scheduled):
        return frame.scheduled_ns
    return frame.closed_ns if isinstance(frame, frames.Updated) else None
