"""Whoever looks at a session: is told who is here, gets what is sent, and may switch capture off and on.

The relay computes nothing for them: what a step was and how long it took, they work out themselves.
"""

from __future__ import annotations

import os
from collections import deque
from typing import TYPE_CHECKING, Any, Final

import msgspec

from otel_npu.wire import frames, looking
from otel_npu.wire.channel import sent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from opentelemetry.sdk.trace import ReadableSpan

    from otel_npu.relay.clients import Clients, Connected

MAX_BACKLOG_BYTES: Final = 16 * 1024 * 1024
"""So much waits at most for one that reads slowly."""


class Viewer:
    """One of them, and what waits for it: to send never blocks."""

    def __init__(self, client: Connected) -> None:
        self.client = client
        self.follows = False
        self.unseen = 0
        self._backlog: deque[bytes] = deque()
        self._backlog_bytes = 0

    @property
    def behind(self) -> bool:
        """Whether something waits for it."""
        return bool(self._backlog)

    def send(self, packet: bytes) -> None:
        """Send it now, or later; it is left out, and counted, when too much waits."""
        if not self._backlog and sent(self.client.connection, packet):
            return
        if self._backlog_bytes + len(packet) > MAX_BACKLOG_BYTES or len(packet) > looking.MAX_PACKET_BYTES:
            self.unseen += 1
            return
        self._backlog.append(packet)
        self._backlog_bytes += len(packet)

    def drain(self) -> None:
        """Send what waits, as far as its socket takes it."""
        while self._backlog and sent(self.client.connection, self._backlog[0]):
            self._backlog_bytes -= len(self._backlog.popleft())


class Viewers:
    """All that look at one relay.

    Args:
        clients: The connections.
        open_requests: The requests that are under way: whose they are, and the frames that announced them.
        state: What was left out, by reason, how many bytes of spans wait, how many may, and how many were exported.
    """

    def __init__(
        self,
        clients: Clients,
        open_requests: Callable[[], Iterable[tuple[Any, frames.Request]]],
        state: Callable[[], tuple[dict[str, int], tuple[int, int, int]]],
    ) -> None:
        self._clients = clients
        self._open_requests = open_requests
        self._state = state
        self._viewers: dict[Connected, Viewer] = {}
        self.followers: list[Viewer] = []
        """Those to whom everything is passed on."""

    @property
    def behind(self) -> bool:
        """Whether something waits for one of them."""
        return any(viewer.behind for viewer in self.followers)

    def look(self, client: Connected, frame: frames.Look) -> None:
        """Tell this one who is here; from now on, if it wants that, all that is sent too.

        Raises:
            ValueError: It speaks another protocol, or is a traced process.
        """
        if client.greeted is not None:
            raise ValueError("a traced process that wants to look")
        viewer = self._viewers.get(client)
        if viewer is None:
            viewer = self._viewers[client] = Viewer(client)
            self._clients.looks(client)
        viewer.send(looking.encode(self._session(viewer)))
        if frame.protocol != frames.PROTOCOL:
            raise ValueError(f"somebody looks by protocol {frame.protocol}, this relay has {frames.PROTOCOL}")
        if frame.follow and not viewer.follows:
            viewer.follows = True
            self.followers = [*self.followers, viewer]
            for each in self._processes():
                assert each.greeted is not None
                self._tell(viewer, each, frames.encode(each.greeted.hello))
            for whose, request in self._open_requests():
                self._tell(viewer, whose, frames.encode(request))

    def forward(self, client: Connected, packet: memoryview) -> None:
        """Pass on what a process has sent."""
        if client in self._viewers:
            return
        seen = looking.encode(looking.Seen(client.number, msgspec.Raw(bytes(packet))))
        for viewer in self.followers:
            viewer.send(seen)

    def made(self, spans: Sequence[ReadableSpan]) -> None:
        """Spans of a request were made."""
        if not spans:
            return
        from otel_npu.relay.encoding import encode_request  # with the SDK, which has been imported by now

        made = looking.encode(looking.Made(encode_request(spans)))
        if len(made) > looking.MAX_PACKET_BYTES and len(spans) > 1:
            half = len(spans) // 2
            self.made(spans[:half])
            self.made(spans[half:])
            return
        for viewer in self.followers:
            viewer.send(made)

    def drain(self) -> None:
        """Send what waits."""
        for viewer in self.followers:
            viewer.drain()

    def part(self, client: Connected) -> None:
        """A connection has gone, which may be one of theirs."""
        viewer = self._viewers.pop(client, None)
        if viewer is not None:
            self.followers = [each for each in self.followers if each is not viewer]

    def _processes(self) -> list[Connected]:
        return [client for client in self._clients if client.greeted is not None]

    def _tell(self, viewer: Viewer, client: Connected, packet: bytes) -> None:
        viewer.send(looking.encode(looking.Seen(client.number, msgspec.Raw(packet))))

    def _session(self, viewer: Viewer) -> looking.Session:
        dropped, queue = self._state()
        processes = self._processes()
        silent = sum(client.greeted is None and client not in self._viewers for client in self._clients)
        return looking.Session(
            os.getpid(), [_process(client) for client in processes], silent, dropped, *queue, viewer.unseen
        )


def _process(client: Connected) -> looking.Process:
    assert client.greeted is not None
    hello = client.greeted.hello
    return looking.Process(
        client.number,
        hello.pid,
        hello.host,
        hello.executable,
        hello.service_name,
        hello.device_kind,
        hello.device_name,
        client.on,
    )
