"""Keeps the channel connected to a relay: a process of its own, or the same code on a thread of this one."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from typing import TYPE_CHECKING, Final

from otel_npu import semconv
from otel_npu.settings import QUEUE_BYTES
from otel_npu.wire import rendezvous
from otel_npu.wire.start import NoInterpreterError, StartedRelay

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
        self._environment = {QUEUE_BYTES: str(settings.queue_bytes), **settings.environment}
        self._drops = drops
        self.failing = False
        """Whether the last try to find or start a relay failed."""
        self._relay: StartedRelay | None = None
        self._thread: threading.Thread | None = None
        self._retry_at = 0.0
        self._retry_seconds = _RETRY_SECONDS
        # Now, not when the idle thread gets to it, which may not be let in for seconds: a child that starts in between
        # shall inherit the session, the relay start beside what the program has still to do, and what is captured
        # outlive a process that is killed. And what a relay on a thread imports is imported before anybody forks.
        try:
            self.keep()
        except Exception:
            _log.exception("a fault of otel-npu's own at the start of the relay")

    def keep(self) -> None:
        """Connect if there is no connection. Called often, by the idle thread."""
        if self._channel.hung_up():
            self._drops.add(semconv.RELAY_LOST)
        self._look_after_relay()
        if self._channel.connected or time.monotonic() < self._retry_at:
            return
        # A relay that ends as soon as it is started must not be started without a pause.
        self._retry_at = time.monotonic() + self._retry_seconds
        try:
            self._channel.attach(self._start_thread() if self._inprocess else self._meet())
            self.failing = False
        except (OSError, RuntimeError) as error:  # the second, if no thread can be started
            self._failed(str(error))

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

    def _look_after_relay(self) -> None:
        """Whether the relay that was started here has begun to serve, or has ended."""
        relay = self._relay
        if relay is None:
            return
        if self._retry_seconds > _RETRY_SECONDS and relay.serving:
            self._retry_seconds = _RETRY_SECONDS
        if relay.wait(0):
            self._relay = None
            died = not relay.serving
            relay.close()
            if died:
                self._failed("it ended as soon as it was started; the log has its last words")

    def _failed(self, why: str) -> None:
        """Try again later, and ever later."""
        self.failing = True
        if self._retry_seconds == _RETRY_SECONDS:
            _log.warning("no relay, so nothing is exported for now: %s", why)
        self._retry_at = time.monotonic() + self._retry_seconds
        self._retry_seconds = min(_MAX_RETRY_SECONDS, self._retry_seconds * 2)

    def _meet(self) -> socket.socket:
        try:
            meeting = rendezvous.meet(rendezvous.session_id(), self._environment)
        except (NoInterpreterError, rendezvous.NoPlaceError) as error:
            _log.warning("no relay can be a process of its own here, so spans are exported from this one: %s", error)
            self._inprocess = True
            return self._start_thread()
        if meeting.relay is not None:
            if self._relay is not None:
                self._relay.close()
            self._relay = meeting.relay
        else:
            self._retry_seconds = _RETRY_SECONDS
        if meeting.instead:
            _log.warning("%s", meeting.instead)
        return meeting.connection

    def _start_thread(self) -> socket.socket:
        from otel_npu.relay.server import Server, exporters_of

        environment = {**os.environ, **self._environment}
        exporters = exporters_of(environment)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with contextlib.ExitStack() as closing:
            closing.callback(ours.close)
            closing.callback(theirs.close)
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, rendezvous.SEND_BUFFER_BYTES)
            server = Server(exporters, environment=environment)
            closing.callback(server.close)
            server.add_client(theirs)
            thread = threading.Thread(target=server.run, name="otel-npu relay", daemon=True)
            thread.start()
            closing.pop_all()
        self._thread = thread
        return ours
