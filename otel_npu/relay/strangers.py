"""Steps that no engine of this relay has told of: held for a moment, and bounded; who tells of most gives way."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from otel_npu.relay.client import Client


class _Told:
    """The steps of which one client told first: how many stages each has, the oldest first, and all together."""

    def __init__(self) -> None:
        self.steps: dict[bytes, int] = {}
        self.stages = 0


class Strangers:
    """Counts such steps, by span id, for whoever told of each first.

    Attributes:
        stages: How many stages they have, together.
    """

    def __init__(self) -> None:
        self.stages = 0
        self._told: dict[Client, _Told] = {}
        self._teller: dict[bytes, Client] = {}

    def add(self, span_id: bytes, client: Client, stages: int) -> None:
        """A rank's run of such a step has come."""
        teller = self._teller.setdefault(span_id, client)
        told = self._told.get(teller)
        if told is None:
            told = self._told[teller] = _Told()
        told.steps[span_id] = told.steps.get(span_id, 0) + stages
        told.stages += stages
        self.stages += stages

    def remove(self, span_id: bytes) -> None:
        """This step is none of them, or none any more."""
        teller = self._teller.pop(span_id, None)
        if teller is None:
            return
        told = self._told[teller]
        stages = told.steps.pop(span_id)
        told.stages -= stages
        self.stages -= stages
        if not told.steps:
            del self._told[teller]

    def first_to_go(self) -> bytes:
        """The oldest of the client that has most."""
        told = max(self._told.values(), key=lambda told: told.stages)
        return next(iter(told.steps))
