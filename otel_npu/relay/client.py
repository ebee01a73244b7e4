"""A traced process, as the relay knows it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from otel_npu.relay.assembler import Assembler
    from otel_npu.relay.batches import Batch


class Account:
    """What one client's frames have become: how many spans, which of them are still on their way, how much is lost.

    Attributes:
        accepted: How many spans of it were put so far.
        lost: How much of what came from it was lost since it last asked, in the receiver or on the way there.
        batches: Those that hold spans of it and are not dealt with; of each the number of spans put before it.
    """

    def __init__(self) -> None:
        self.accepted = self.lost = 0
        self.batches: dict[Batch, int] = {}

    @property
    def handled(self) -> int:
        """So many of the first of its spans are dealt with: taken by all exporters, or lost and counted."""
        return min(self.batches.values(), default=self.accepted)

    def lose(self, count: int = 1) -> None:
        """Something that came from it is lost: its next flush has to say so."""
        self.lost += count


class Client:
    """One process: until it has said hello, nobody."""

    def __init__(self) -> None:
        self.greeted: Assembler | None = None
        self.account = Account()
        self.held_bytes = 0
        """About how much memory its frames take that are held."""

    @property
    def assembler(self) -> Assembler:
        """Makes its spans.

        Raises:
            ValueError: It has not said hello.
        """
        if self.greeted is None:
            raise ValueError("a frame before the hello")
        return self.greeted
