"""What was left out, by reason: counted where it happens, reported with the next step and once a minute."""

from __future__ import annotations

import threading
from typing import Final

from otel_npu import semconv

REPORT_SECONDS: Final = 60.0
_LOST: Final = frozenset({semconv.BACKLOG_FULL, semconv.BAD_FRAME, semconv.RELAY_LOST})
_REASONS: Final = frozenset(term.name for term in semconv.DROP_REASONS)
_MOST: Final = 1 << 53


def add_up(total: dict[str, int], counts: dict[str, int]) -> None:
    """Add counts that come from elsewhere: of reasons that nobody knows there may be any number, so they are one."""
    for reason, count in counts.items():
        known = reason if reason in _REASONS else semconv.OTHER
        total[known] = min(_MOST, total.get(known, 0) + count)


class Drops:
    """Counts by reason (`semconv.DROP_REASONS`), for any thread, and for a signal handler in the midst of it."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self.unsent: dict[str, int] = {}
        """What goes with the next frame. Always the same: whoever sends many looks whether there is anything."""
        self._unlogged: dict[str, int] = {}
        self.lost = 0
        """How much of what was captured did not reach the relay."""
        self._totals: dict[str, int] = {}

    def add(self, reason: str, count: int = 1) -> None:
        """Count something that was left out."""
        with self._lock:
            self.unsent[reason] = self.unsent.get(reason, 0) + count
            self._unlogged[reason] = self._unlogged.get(reason, 0) + count
            if reason in _LOST:
                self.lost += count
            self._totals[reason] = self._totals.get(reason, 0) + count

    def put_back(self, counts: dict[str, int]) -> None:
        """What was taken to be sent did not arrive: it goes with the next frame."""
        with self._lock:
            add_up(self.unsent, counts)

    def take_unsent(self) -> dict[str, int]:
        """The counts since the last call, for the next frame."""
        counts: dict[str, int] = {}
        if self.unsent:  # seldom
            with self._lock:
                while self.unsent:  # one by one: what a signal handler adds meanwhile is not lost
                    reason, count = self.unsent.popitem()
                    counts[reason] = counts.get(reason, 0) + count
        return counts

    def totals(self) -> dict[str, int]:
        """All that was ever counted here."""
        with self._lock:
            return dict(self._totals)

    def take_line(self) -> str:
        """The counts since the last call as one line for the log; empty when there are none."""
        with self._lock:
            counts, self._unlogged = self._unlogged, {}
        return ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))
