"""What was left out, by reason: counted where it happens, reported with the next step and once a minute."""

from __future__ import annotations

import threading
from typing import Final

REPORT_SECONDS: Final = 60.0


class Drops:
    """Counts by reason (`semconv.DROP_REASONS`), for any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._unsent: dict[str, int] = {}
        self._unlogged: dict[str, int] = {}

    def add(self, reason: str, count: int = 1) -> None:
        """Count something that was left out."""
        with self._lock:
            self._unsent[reason] = self._unsent.get(reason, 0) + count
            self._unlogged[reason] = self._unlogged.get(reason, 0) + count

    def put_back(self, counts: dict[str, int]) -> None:
        """What was taken to be sent did not arrive: it goes with the next frame."""
        with self._lock:
            for reason, count in counts.items():
                self._unsent[reason] = self._unsent.get(reason, 0) + count

    def take_unsent(self) -> dict[str, int]:
        """The counts since the last call, for the next frame."""
        if not self._unsent:  # nearly always
            return {}
        with self._lock:
            counts, self._unsent = self._unsent, {}
        return counts

    def take_line(self) -> str:
        """The counts since the last call as one line for the log; empty when there are none."""
        with self._lock:
            counts, self._unlogged = self._unlogged, {}
        return ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))
