"""The connections of a relay: taken, read a packet at a time, and given up where there are too many."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import itertools
import logging
import select
import socket
import time
from typing import TYPE_CHECKING, Final

from otel_npu import semconv
from otel_npu.relay.client import Client
from otel_npu.wire import frames, rendezvous

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from otel_npu.drops import Drops

_log = logging.getLogger("otel_npu.relay")

PACKETS_PER_TURN: Final = 256
"""So many of one client are read, then it is the others' turn."""
MAX_CLIENTS: Final = 1024
_LATER_SECONDS: Final = 1.0
_WAKE: Final = b"\0"
# The call that socket.recv_into() makes, but with the GIL held: the exporter's thread, which encodes, would take it
# for 5 ms at each packet.
_recv: Final = ctypes.PyDLL(None, use_errno=True).recv
_recv.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_recv.restype = ctypes.c_ssize_t
_RECV_FLAGS: Final = socket.MSG_DONTWAIT | socket.MSG_TRUNC  # the second gives a packet's length, however long


_numbers: Final = itertools.count(1)


class Connected(Client):
    """A client and its connection."""

    def __init__(self, connection: socket.socket) -> None:
        super().__init__()
        self.connection = connection
        self.number = next(_numbers)
        self.on = True
        """Whether it captures, as far as it has said."""
        self.looks = False
        """Whether it is no traced process, but somebody who looks at those."""
        self.complaints: set[str] = set()
        """What the log says that it did wrong."""


class Clients:
    """All connections of one relay.

    Args:
        listeners: Take new connections.
        drops: Where connections that could not be taken are counted.
        parted: Told of each client that has gone.
    """

    def __init__(self, listeners: Sequence[socket.socket], drops: Drops, parted: Callable[[Connected], None]) -> None:
        self._drops = drops
        self._parted = parted
        self._clients: dict[int, Connected] = {}
        self._looking = 0
        self._buffer = bytearray(frames.MAX_FRAME_BYTES)
        self._view = memoryview(self._buffer)
        self._address = ctypes.addressof((ctypes.c_char * len(self._buffer)).from_buffer(self._buffer))
        self._listeners = {listener.fileno(): listener for listener in listeners}
        self._listen_again = 0.0
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._wake_writer.setblocking(False)
        self._sockets = select.epoll()
        self._doors = select.epoll()
        """Only what must not be kept waiting while the senders are left alone."""
        for poll in (self._sockets, self._doors):
            poll.register(self._wake_reader, select.EPOLLIN)
        for listener in listeners:
            listener.setblocking(False)
        self._listen()

    def __len__(self) -> int:
        """How many are to be served: whoever only looks keeps no relay alive."""
        return len(self._clients) - self._looking

    def __iter__(self) -> Iterator[Connected]:
        return iter(list(self._clients.values()))

    def add(self, connection: socket.socket) -> None:
        """Serve this connection too."""
        connection.setblocking(False)
        self._clients[connection.fileno()] = Connected(connection)
        self._sockets.register(connection, select.EPOLLIN)
        self._doors.register(connection, 0)  # its end comes all the same, and somebody may wait for what follows

    def looks(self, client: Connected) -> None:
        """This one only looks."""
        client.looks = True
        self._looking += 1

    def wake(self) -> None:
        """End the wait that goes on, or the next one. Safe in a signal handler and from other threads."""
        with contextlib.suppress(OSError):  # it has been woken, or all is closed
            self._wake_writer.send(_WAKE)

    def wait(self, seconds: float) -> list[Connected]:
        """Those who have sent something, as soon as anybody has; none after so many seconds."""
        ready = []
        for descriptor, _ in self._sockets.poll(seconds):
            client = self._clients.get(descriptor)
            if client is not None:
                ready.append(client)
            else:
                self._answer(descriptor)
        if self._listen_again and time.monotonic() >= self._listen_again:
            self._listen()
        return ready

    def rest(self, seconds: float) -> None:
        """Leave them alone for so long; whoever wants to connect is taken nevertheless, and who hangs up ends it."""
        for descriptor, _ in self._doors.poll(seconds):
            if descriptor not in self._clients:
                self._answer(descriptor)

    def packets(self, client: Connected) -> Iterator[memoryview | None]:
        """What one client has sent, up to its share of a turn; None for a packet that is too long."""
        descriptor, address, size = client.connection.fileno(), self._address, len(self._buffer)
        for _ in range(PACKETS_PER_TURN):
            length = _recv(descriptor, address, size, _RECV_FLAGS)
            if length > size:
                yield None
            elif length > 0:
                yield self._view[:length]
            elif length < 0 and ctypes.get_errno() in (errno.EAGAIN, errno.EINTR):
                return
            else:
                self.part(client)
                return

    def accept_waiting(self) -> bool:
        """Take the connections that wait; whether there is anybody to serve."""
        for listener in self._listeners.values():
            while self._accept(listener):
                pass
        return len(self) > 0

    def refuse(self) -> None:
        """From now on whoever connects is told that nobody is there. Who waits already is still taken."""
        self._stop_listening()
        for listener in self._listeners.values():
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RD)

    def part(self, client: Connected) -> None:
        """Let a client go."""
        if self._clients.pop(client.connection.fileno(), None) is not None:
            self._looking -= client.looks
            for poll in (self._sockets, self._doors):
                poll.unregister(client.connection)
            client.connection.close()
            self._parted(client)

    def close(self) -> None:
        """Let all go."""
        for client in self:
            self.part(client)
        for listener in self._listeners.values():
            listener.close()
        for each in (self._sockets, self._doors, self._wake_reader, self._wake_writer):
            each.close()

    def abandon(self) -> None:
        """The descriptors have been closed by somebody else, and may by now be something else: they are left alone."""
        for each in (*(client.connection for client in self), *self._listeners.values()):
            each.detach()
        self._wake_reader.detach()
        self._wake_writer.detach()
        _abandoned.extend((self._sockets, self._doors))
        clients, self._clients = self._clients, {}
        for client in clients.values():
            self._parted(client)

    def _answer(self, descriptor: int) -> None:
        listener = self._listeners.get(descriptor)
        if listener is None:
            self._wake_reader.recv(64)
            return
        while self._accept(listener):
            pass

    def _listen(self) -> None:
        self._listen_again = 0.0
        for listener in self._listeners.values():
            for poll in (self._sockets, self._doors):
                with contextlib.suppress(FileExistsError):
                    poll.register(listener, select.EPOLLIN)

    def _stop_listening(self) -> None:
        self._listen_again = 0.0
        for listener in self._listeners.values():
            for poll in (self._sockets, self._doors):
                with contextlib.suppress(FileNotFoundError):
                    poll.unregister(listener)

    def _accept(self, listener: socket.socket) -> bool:
        try:
            connection, _ = listener.accept()
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ECONNABORTED):  # none comes here any more, or it has gone
                # No descriptors left, say: it waits until there are, and those who are here are served meanwhile.
                self._drops.add(semconv.INTERNAL_ERROR)
                _log.debug("can't take a connection now: %s", error)
                self._stop_listening()
                self._listen_again = time.monotonic() + _LATER_SECONDS
            return False
        try:
            rendezvous.check_peer(connection)
        except OSError as error:
            _log.warning("refused a connection: %s", error)
            connection.close()
            return True
        if len(self._clients) >= MAX_CLIENTS:
            silent = next((client for client in self if client.greeted is None and not client.looks), None)
            if silent is None:
                _log.debug("refused a connection: there are %d", MAX_CLIENTS)
                self._drops.add(semconv.RELAY_FULL)
                connection.close()
                return True
            self.part(silent)
        self.add(connection)
        return True


_abandoned: Final[list[select.epoll]] = []
