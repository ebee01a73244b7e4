"""What has become of what one traced process sent."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Hashable


class Account:
    """What one client's frames have become: how many spans, which of them are still on their way, how much is lost.

    Attributes:
        accepted: How many spans of it were put so far.
        lost: How much of what came from it was lost since it last asked, in the receiver or on the way there.
        held_bytes: About how much memory what came from it takes that is held.
        batches: What holds spans of it and is not dealt with; of each the number of spans put before it.
    """

    def __init__(self) -> None:
        self.accepted = self.lost = self.held_bytes = 0
        self.batches: dict[Hashable, int] = {}

    @property
    def handled(self) -> int:
        """So many of the first of its spans are dealt with: taken by all exporters, or lost and counted."""
        return min(self.batches.values(), default=self.accepted)

    def lose(self, count: int = 1) -> None:
        """Something that came from it is lost: its next flush has to say so."""
        self.lost += count
