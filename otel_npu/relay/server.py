"""The relay's loop: takes connections, reads frames, hands spans to the exporter, answers flushes."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import selectors
import socket
import threading
import time
from typing import TYPE_CHECKING, Any, Final

import msgspec

from otel_npu import semconv
from otel_npu.drops import REPORT_SECONDS, Drops
from otel_npu.relay.assembler import Assembler
from otel_npu.relay.client import Client
from otel_npu.relay.export import ExportQueue
from otel_npu.relay.exporters import Nowhere, exporters_from_environment
from otel_npu.relay.joiner import Joiner
from otel_npu.relay.otlp_settings import ExportError
from otel_npu.relay.patience import Patience
from otel_npu.relay.spans import span_limits
from otel_npu.relay.wall import WallClock
from otel_npu.slow import SlowSteps
from otel_npu.wire import frames, rendezvous

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from opentelemetry.sdk.trace.export import SpanExporter

    from otel_npu.relay.client import Account

_log = logging.getLogger("otel_npu.relay")

_TICK_SECONDS: Final = 0.5
_LOOK_SECONDS: Final = 0.01
_QUIET_SECONDS: Final = 1.0
_FIRST_CLIENT_SECONDS: Final = 10.0
_FRAMES_PER_TURN: Final = 1024
DRAIN_SECONDS: Final = 5.0
_MAX_FLUSH_SECONDS: Final = 60.0
_WAKE: Final = b"\0"


class _Client(Client):
    """One connection."""

    def __init__(self, connection: socket.socket) -> None:
        super().__init__()
        self.connection = connection


class Server:
    """Serves the processes of one session.

    Args:
        exporters: Where spans go.
        listener: Takes new connections; without one the server has only the clients it is given.
        stay: Whether to go on when the last client has gone, as a relay in a container of its own does.
    """

    def __init__(
        self, exporters: Sequence[SpanExporter], listener: socket.socket | None = None, *, stay: bool = False
    ) -> None:
        self._drops = Drops()
        self._export = ExportQueue(exporters, self._drops)
        self._listener = listener
        self._stay = stay
        self._wall = WallClock()
        self._limits = span_limits()
        self._patience = Patience()
        self._joiner = Joiner(self._wall, self._export.put, self._drops, self._patience)
        self._flushes: list[tuple[Account, socket.socket, frames.Flush]] = []
        self._clients: dict[int, _Client] = {}
        self._selector = selectors.DefaultSelector()
        self._buffer = bytearray(frames.MAX_FRAME_BYTES)
        self._view = memoryview(self._buffer)
        self._started = time.monotonic()
        self._last_frame = time.monotonic()
        self._had_clients = False
        self._stopping = False
        self._next_drop_line = time.monotonic() + REPORT_SECONDS
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._wake_writer.setblocking(False)
        self._selector.register(self._wake_reader, selectors.EVENT_READ)
        if listener is not None:
            listener.setblocking(False)
            self._selector.register(listener, selectors.EVENT_READ)

    @classmethod
    def from_environment(
        cls,
        listener: socket.socket | None = None,
        *,
        stay: bool = False,
        environment: Mapping[str, str] = os.environ,
    ) -> Server:
        """A server with the exporters that the environment names. If it names a bad one, nothing is exported."""
        try:
            exporters = exporters_from_environment(environment)
        except ExportError as error:
            _log.error("%s; no spans are exported", error)
            exporters = [Nowhere()]
        except Exception:
            _log.exception("the exporter could not be made; no spans are exported")
            exporters = [Nowhere()]
        return cls(exporters, listener, stay=stay)

    def add_client(self, connection: socket.socket) -> None:
        """Serve this connection too."""
        connection.setblocking(False)
        self._clients[connection.fileno()] = _Client(connection)
        self._selector.register(connection, selectors.EVENT_READ)
        self._had_clients = True

    def stop(self) -> None:
        """Read what is there, export it, and end. Safe in a signal handler and from other threads."""
        self._stopping = True
        with contextlib.suppress(OSError):  # it has been woken, or it has ended
            self._wake_writer.send(_WAKE)

    def run(self, leave: Callable[[], None] = lambda: None) -> None:
        """Serve until there is nobody left to serve, or until stopped; then read and export what is there.

        Args:
            leave: Takes the listening socket's name away, so that from then on whoever needs a relay starts another.
        """
        left = False
        while not self._stopping:
            if self._deserted():
                if not left:
                    leave()
                    left = True
                if not self.accept_waiting():
                    break
            self._serve()
        if not left:
            leave()
        self.accept_waiting()
        for client in self._clients.values():
            # What is in the socket is read; what the client has still to say it keeps for the next relay.
            with contextlib.suppress(OSError):
                client.connection.shutdown(socket.SHUT_RD)
        deadline = time.monotonic() + DRAIN_SECONDS
        while self._turn(0.0) and time.monotonic() < deadline:
            pass
        self._guarded(self._joiner.drain)
        self._export.close(DRAIN_SECONDS)
        self._log_drops()
        for client in list(self._clients.values()):
            self._part(client)
        self._selector.close()
        if self._listener is not None:
            self._listener.close()
        self._wake_reader.close()
        self._wake_writer.close()

    def accept_waiting(self) -> bool:
        """Take the connections that wait; whether there is anybody to serve."""
        while self._listener is not None and self._accept():
            pass
        return bool(self._clients)

    def _serve(self) -> None:
        """Read all that is there, then leave the senders alone for a moment.

        A frame that arrives while the relay waits for one makes the sender wake it, which costs the model's thread
        more than sending. So the relay looks by itself, and waits only when nothing has come for a while.
        """
        quiet = time.monotonic() - self._last_frame > _QUIET_SECONDS and not self._joiner.waiting
        if self._turn(_TICK_SECONDS if quiet else 0.0):
            self._last_frame = time.monotonic()
            quiet = False
        if not quiet:
            time.sleep(_LOOK_SECONDS)

    def _deserted(self) -> bool:
        if self._clients or self._stay:
            return False
        return self._had_clients or time.monotonic() - self._started > _FIRST_CLIENT_SECONDS

    def _turn(self, wait_seconds: float) -> bool:
        """Handle what is there; whether there was anything."""
        busy = self._look(wait_seconds)
        self._patience.turn()
        if self._flushes:
            self._look(0.0)  # what others have sent before it lies in their sockets
            self._guarded(self._joiner.flush)
            flushes, self._flushes = self._flushes, []
            for account, connection, frame in flushes:
                self._flush(account, connection, frame)
        self._guarded(self._joiner.tick)
        if time.monotonic() >= self._next_drop_line:
            self._next_drop_line = time.monotonic() + REPORT_SECONDS
            self._log_drops()
        return busy

    def _look(self, wait_seconds: float) -> bool:
        """Read what is there; whether there was anything."""
        ready = self._selector.select(wait_seconds)
        for key, _ in ready:
            if key.fileobj is self._listener:
                self.accept_waiting()
            elif key.fileobj is self._wake_reader:
                self._wake_reader.recv(64)
            else:
                client = self._clients.get(key.fd)
                if client is not None:
                    self._read(client)
        return bool(ready)

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception:
            self._drops.add(semconv.INTERNAL_ERROR)
            _log.exception("a fault of otel-npu's own; spans are lost")

    def _accept(self) -> bool:
        assert self._listener is not None
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:
            return False
        except OSError as error:  # no descriptors left, say: the connection waits until there are
            self._drops.add(semconv.INTERNAL_ERROR)
            _log.debug("can't take a connection now: %s", error)
            time.sleep(_TICK_SECONDS)
            return False
        try:
            rendezvous.check_peer(connection)
        except OSError as error:
            _log.warning("refused a connection: %s", error)
            connection.close()
        else:
            self.add_client(connection)
        return True

    def _read(self, client: _Client) -> None:
        for _ in range(_FRAMES_PER_TURN):  # then it is somebody else's turn
            try:
                length, _, flags, _ = client.connection.recvmsg_into([self._buffer], 0, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError:
                length, flags = 0, 0
            if not length:
                self._part(client)
                return
            if flags & socket.MSG_TRUNC:
                self._bad_frame(client, "longer than frames may be")
                continue
            self._take(client, frames.decode_frame, self._view[:length])

    def _take(self, client: _Client, decode: Callable[[Any], frames.Frame], packet: memoryview | msgspec.Raw) -> None:
        try:
            frame = decode(packet)
            self._patience.read(frame)
            self._handle(client, frame)
        except (msgspec.MsgspecError, ValueError) as error:
            self._bad_frame(client, str(error))
        except Exception:
            self._drops.add(semconv.INTERNAL_ERROR)
            client.account.lose()
            _log.exception("a fault of otel-npu's own; the frame is lost")

    def _handle(self, client: _Client, frame: frames.Frame) -> None:
        if isinstance(frame, frames.Hello):
            if frame.protocol != frames.PROTOCOL:
                raise ValueError(f"protocol {frame.protocol}, this relay has {frames.PROTOCOL}")
            assembler = Assembler(frame, self._wall, self._limits, SlowSteps(frame.slow_step, self._drops))
            assembler.replaces(client.greeted)
            client.greeted = assembler
        elif isinstance(frame, frames.Flush):
            self._flushes.append((client.account, client.connection.dup(), frame))
        elif isinstance(frame, frames.Ping):
            client.assembler.timeline.ping(frame)
        elif isinstance(frame, frames.Unfinished):
            self._unfinished(client, frame)
        elif isinstance(frame, frames.Steps):
            for step in frame.steps:  # one that is bad costs no other
                self._take(client, frames.decode_step, step)
        elif isinstance(frame, frames.Step):
            client.assembler.count_drops(self._drops.take_unsent())
            spans = client.assembler.step(frame, functools.partial(self._joiner.ran, client))
            self._export.put(spans, client.account)
        else:
            self._joiner.take(client, frame)

    def _unfinished(self, client: _Client, frame: frames.Unfinished) -> None:
        span = client.assembler.unfinished(frame)
        if frame.trace_id:
            self._export.put([span], client.account)
        if frame.engine_span_id:
            self._joiner.keep(frame.engine_span_id, semconv.HANG)

    def _flush(self, account: Account, connection: socket.socket, frame: frames.Flush) -> None:
        """Answer when the exporter is done, from a thread of its own: others must not wait meanwhile."""
        accepted = account.accepted

        def answer() -> None:
            complete = self._export.flush(account, accepted, min(frame.timeout_seconds, _MAX_FLUSH_SECONDS))
            with connection:
                try:
                    connection.send(frames.encode(frames.Flushed(frame.number, complete)), socket.MSG_NOSIGNAL)
                except OSError:
                    _log.debug("nobody waits for the flush any more")

        threading.Thread(target=answer, name="otel-npu flush", daemon=True).start()

    def _bad_frame(self, client: _Client, why: str) -> None:
        self._drops.add(semconv.BAD_FRAME)
        client.account.lose()
        if why != client.complaint:  # once, not once a frame
            client.complaint = why
            number = client.connection.fileno()
            _log.warning("a frame on connection %d can't be read and is left out: %s", number, why)

    def _part(self, client: _Client) -> None:
        self._selector.unregister(client.connection)
        del self._clients[client.connection.fileno()]
        client.connection.close()
        self._guarded(lambda: self._joiner.part(client))

    def _log_drops(self) -> None:
        line = self._drops.take_line()
        if line:
            _log.warning("left out in the last minute: %s", line)
