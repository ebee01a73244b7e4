"""Capture off and on in all processes of a session, as somebody who looks at it wants."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from otel_npu.wire import frames
from otel_npu.wire.channel import sent

if TYPE_CHECKING:
    from collections.abc import Callable

    from otel_npu.relay.clients import Clients, Connected

QUIET_SECONDS: Final = 1.0
"""By then all that was captured has come."""


class Switching:
    """What is wanted of the session's processes, and of those that come later.

    Args:
        clients: The connections.
        quiet: Called when capture has been off for a while: what is under way is told no further.
        now: Seconds that go on by themselves.
    """

    def __init__(self, clients: Clients, quiet: Callable[[], None], now: Callable[[], float] = time.monotonic) -> None:
        self._clients = clients
        self._quiet = quiet
        self._now = now
        self._wanted: bool | None = None
        """None as long as nobody has wanted anything: each is as it began."""
        self._quiet_at: float | None = None

    @property
    def waiting(self) -> bool:
        """Whether anything here has a deadline."""
        return self._quiet_at is not None

    def want(self, *, on: bool) -> None:
        """Tell all."""
        self._wanted = on
        self._quiet_at = None if on else self._now() + QUIET_SECONDS
        for client in self._clients:
            if not client.looks:
                self._tell(client)

    def greeted(self, client: Connected, *, on: bool) -> None:
        """A process has said who it is, and whether it captures: it may be new."""
        client.on = on
        if self._wanted is not None and on != self._wanted:
            self._tell(client)

    def tick(self) -> None:
        """Be done with what capture was about, once that is quiet."""
        if self._quiet_at is not None and self._now() >= self._quiet_at:
            self._quiet_at = None
            self._quiet()

    def _tell(self, client: Connected) -> None:
        assert self._wanted is not None
        sent(client.connection, frames.encode(frames.Switch(self._wanted)))  # else whoever looks asks once more
