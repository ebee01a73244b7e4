"""What the log says of a receiver: one line when it goes away, one a minute while it is, one when it is back."""

from __future__ import annotations

import logging
from typing import Final

from otel_npu.drops import REPORT_SECONDS

_log = logging.getLogger("otel_npu.relay")

_TRIES_BEFORE_A_LINE: Final = 2  # one that fails alone is nothing to tell of


class Availability:
    """Whether a receiver takes spans.

    Args:
        name: What the log calls it.
        promise: What happens to spans meanwhile, in words.
    """

    def __init__(self, name: str, promise: str) -> None:
        self._name = name
        self._promise = promise
        self._tries = 0
        self._error = ""
        self._since = 0.0
        self._lost = 0
        self._next_line: float | None = None
        self._next_refusal = 0.0

    @property
    def away(self) -> bool:
        """Whether the last try failed."""
        return self._tries > 0

    def failed(self, error: str, now: float) -> None:
        """A try has failed, but may succeed later."""
        self._tries += 1
        self._error = error
        if self._tries == 1:
            self._since = now
        if self._tries == _TRIES_BEFORE_A_LINE:
            self._tell_away(now)

    def lost(self, count: int) -> None:
        """Spans were lost while it was away."""
        self._lost += count

    def reached(self, now: float) -> None:
        """It has answered."""
        if self._next_line is not None:
            lost = f"{self._lost} spans were lost" if self._lost else "no span was lost"
            _log.warning("%s takes spans again after %.0f s; %s", self._name, now - self._since, lost)
        self._tries = self._lost = 0
        self._next_line = None

    def refused(self, count: int, error: str, now: float) -> None:
        """It has refused or rejected spans for good; once a minute that is a line."""
        if error and now >= self._next_refusal:
            self._next_refusal = now + REPORT_SECONDS
            _log.warning("%s refuses spans: %s; %d of them are lost", self._name, error, count)

    def tick(self, spans: int, size: int, now: float) -> None:
        """Say that it is still away, if it is time to: so many spans wait, in so many bytes."""
        if self._next_line is not None and now >= self._next_line:
            self._next_line = now + REPORT_SECONDS
            _log.warning(
                "%s has taken no spans for %.0f s: %s; %d spans wait in %.1f MB, %d were lost",
                *(self._name, now - self._since, self._error, spans, size / 1e6, self._lost),
            )

    def tell(self, now: float) -> None:
        """Say that it is away, if that was not said yet: whoever reads the log may be about to go."""
        if self.away and self._next_line is None:
            self._tell_away(now)

    def _tell_away(self, now: float) -> None:
        self._next_line = now + REPORT_SECONDS
        _log.warning("%s takes no spans: %s; %s", self._name, self._error, self._promise)
