"""What traced processes make the relay hold: bounded for each and for all, and given back by itself."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Final

from otel_npu.wire import frames

if TYPE_CHECKING:
    from otel_npu.relay.account import Account

MAX_BYTES_PER_CLIENT: Final = 48 * 1024 * 1024
MAX_BYTES: Final = 64 * 1024 * 1024
LITTLE_BYTES: Final = 2 * 1024 * 1024
"""Of whom less is held, nothing gives way for another of whom more is."""
_RESERVED_BYTES: Final = 8 * 1024 * 1024
"""Of all, for those of whom little is held: two who flood, or one who comes back, leave them room."""
CROWDED_BYTES: Final = MAX_BYTES_PER_CLIENT // 2
"""Where more is held of one, it is read after the others, and its frames take nothing from those of whom less is."""

# What objects take beside the bytes that they have in the packet, as far as anybody can make many of them.
_PER_FRAME: Final = 1000
_PER_OPEN_REQUEST: Final = 1200
_PER_ENGINE_STEP: Final = 600
_PER_STAGE: Final = 500
_PER_REQUEST: Final = 200
_PER_ATTRIBUTE: Final = 200
_PER_ITEM: Final = 60

_ORDINARY_BYTES: Final = 2048
_HELD: Final = (frames.Step, frames.Request, frames.Scheduled, frames.RequestEnd)


def weight(frame: frames.Frame, packet_bytes: int) -> int:
    """About how many bytes a frame and what is made of it take as long as it is held."""
    parts = 0
    if isinstance(frame, frames.Step):
        parts = _PER_STAGE * len(frame.stages) + _PER_ITEM * len(frame.links)
        if packet_bytes > _ORDINARY_BYTES:
            parts += _of_attributes(frame.attributes)
            parts += sum(_of_attributes(stage.attributes) for stage in frame.stages)
    elif isinstance(frame, frames.Scheduled):
        parts = _PER_ENGINE_STEP + _PER_REQUEST * len(frame.requests)
        parts += _PER_ITEM * (len(frame.preempted) + len(frame.ended))
    elif isinstance(frame, frames.Request):
        parts = _PER_OPEN_REQUEST
    return _PER_FRAME + packet_bytes + parts


def _of_attributes(attributes: frames.Attributes | None) -> int:
    if not attributes:
        return 0
    items = sum(len(value) for value in attributes.values() if isinstance(value, list))
    return _PER_ATTRIBUTE * len(attributes) + _PER_ITEM * items


class _Held(weakref.ref[frames.Frame]):
    """A frame that was taken: as long as somebody holds it, it is on the ledger."""

    __slots__ = ("account", "weight")

    account: Account
    weight: int


class Ledger:
    """Counts the frames that are still held, whoever holds them: nobody has to give anything back."""

    def __init__(self) -> None:
        self.bytes = 0
        self._held: dict[int, _Held] = {}
        """By their own ids: a reference has the hash of what it refers to, and frames have none."""

    def has_room(self, account: Account, frame: frames.Frame) -> bool:
        """Whether one more such frame of this client may be held."""
        if not isinstance(frame, _HELD):
            return True
        most = MAX_BYTES if account.held_bytes < LITTLE_BYTES else MAX_BYTES - _RESERVED_BYTES
        return account.held_bytes < MAX_BYTES_PER_CLIENT and self.bytes < most

    def hold(self, account: Account, frame: frames.Frame, packet_bytes: int) -> None:
        """Count a frame of a client for as long as it is there."""
        if not isinstance(frame, _HELD):
            return
        held = _Held(frame, self._let_go)
        held.account, held.weight = account, weight(frame, packet_bytes)
        account.held_bytes += held.weight
        self.bytes += held.weight
        self._held[id(held)] = held

    def _let_go(self, held: _Held) -> None:
        del self._held[id(held)]
        held.account.held_bytes -= held.weight
        self.bytes -= held.weight
