"""Keeps the channel connected to a relay: a process of its own, or the same code on a thread of this one."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from typing import TYPE_CHECKING, Final

from otel_npu import loading, semconv
from otel_npu.wire import rendezvous

if TYPE_CHECKING:
    from otel_npu.drops import Drops
    from otel_npu.settings import Settings
    from otel_npu.wire.channel import Channel

_log = logging.getLogger("otel_npu")

_RETRY_SECONDS: Final = 1.0
_MAX_RETRY_SECONDS: Final = 60.0


class RelayLink:
    """Finds or starts the relay, notices when it has gone, and waits for it at the end.

    Args:
        channel: The channel to keep connected.
        settings: Says whether the relay is a process or a thread.
        drops: Where lost relays are counted.
    """

    def __init__(self, channel: Channel, settings: Settings, drops: Drops) -> None:
        self._channel = channel
        self._inprocess = settings.export == "inprocess"
        self._environment = settings.environment
        self._drops = drops
        self.failing = False
        """Whether the last try to find or start a relay failed."""
        self._relay: rendezvous.StartedRelay | None = None
        self._thread: threading.Thread | None = None
        self._retry_at = 0.0
        self._retry_seconds = _RETRY_SECONDS
        if not self._inprocess:
            # Now, not when the idle thread gets to it: a child that starts in between shall inherit it.
            with contextlib.suppress(OSError):
                rendezvous.session_id()

    def keep(self) -> None:
        """Connect if there is no connection. Called often, by the idle thread."""
        if self._channel.hung_up():
            self._drops.add(semconv.RELAY_LOST)
        if self._relay is not None and self._relay.wait(0):
            self._relay.close()
            self._relay = None
        if self._channel.connected or time.monotonic() < self._retry_at:
            return
        try:
            self._channel.attach(self._start_thread() if self._inprocess else self._meet())
        except OSError as error:
            self.failing = True
            if self._retry_seconds == _RETRY_SECONDS:
                _log.warning("no relay, so nothing is exported for now: %s", error)
            self._retry_at = time.monotonic() + self._retry_seconds
            self._retry_seconds = min(_MAX_RETRY_SECONDS, self._retry_seconds * 2)
        else:
            self.failing = False
            # A relay that ends as soon as it is started must not be started without a pause.
            self._retry_at = time.monotonic() + _RETRY_SECONDS
            self._retry_seconds = _RETRY_SECONDS

    def close(self, timeout_seconds: float) -> None:
        """Hang up. Whoever started the relay waits for its end, as long as it may."""
        self._channel.close()
        if self._thread is not None:
            self._thread.join(timeout_seconds)
        relay, self._relay = self._relay, None
        if relay is not None:
            if not relay.wait(timeout_seconds):
                _log.debug("the relay goes on without this process: it has other clients, or more to export")
            relay.close()

    def _meet(self) -> socket.socket:
        connection, relay = rendezvous.connect_or_start(
            rendezvous.socket_path(rendezvous.session_id()), self._environment
        )
        if relay is not None:
            self._relay = relay
        return connection

    def _start_thread(self) -> socket.socket:
        with loading.lock:
            from otel_npu.relay.server import Server

        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, rendezvous.SEND_BUFFER_BYTES)
        server = Server.from_environment(environment={**os.environ, **self._environment})
        server.add_client(theirs)
        self._thread = threading.Thread(target=server.run, name="otel-npu relay", daemon=True)
        self._thread.start()
        return ours
