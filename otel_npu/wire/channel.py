"""The sending end: frames go into the socket or, while it takes none, into a bounded buffer. It never blocks."""

from __future__ import annotations

import ctypes
import logging
import os
import select
import socket
import threading
import time
from collections import deque
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from otel_npu import semconv
from otel_npu.drops import add_up
from otel_npu.interrupts import from_outside
from otel_npu.native import native
from otel_npu.wire import frames

if TYPE_CHECKING:
    from collections.abc import Callable

    from otel_npu.drops import Drops

_log = logging.getLogger("otel_npu")

MAX_BACKLOG_BYTES: Final = 8 * 1024 * 1024
MOST_DEFERRED: Final = 128
DEFERRED_NS: Final = 250_000_000
_FRAMES_PER_LOCK: Final = 16
_MAX_ANSWERS: Final = 64
_MAX_WAIT_SECONDS: Final = 3600.0  # poll() takes no more than 24 days
_NOTHING: Final[dict[str, int]] = {}
_SEND_FLAGS: Final = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
# The call that socket.send() makes, but with the GIL held: to get it back takes longer than to send, where another
# thread wants it.
_send: Final = ctypes.PyDLL(None).send
_send.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int)
_send.restype = ctypes.c_ssize_t


_Deferred: TypeAlias = "deque[tuple[dict[str, int], Callable[..., frames.Frame], tuple[Any, ...]]]"

if TYPE_CHECKING or native is None:

    class ChannelRecord:
        """What has been put off: each time its drop counts, what makes the frame, and of what; and since when."""

        deferred: _Deferred
        deferred_since_ns: int

else:
    ChannelRecord = native.ChannelRecord


class Channel(ChannelRecord):
    """Frames to the relay, in order, from any thread.

    Args:
        hello: Makes the first frame of a connection. Called when the first frame is about to leave, because only
            then is the device known.
        drops: Where frames that could not be kept are counted.
    """

    def __init__(self, hello: Callable[[], frames.Hello], drops: Drops) -> None:
        self._hello = hello
        self._drops = drops
        self._socket: socket.socket | None = None
        self._inode = 0
        """Of the socket: the program may close it under us, and its number then stand for something else."""
        self._greeted = False
        self._backlog: deque[tuple[bytes, dict[str, int]]] = deque()
        self._backlog_bytes = 0
        self.deferred = deque()
        self.deferred_since_ns = 0
        self._lock = threading.RLock()  # a signal handler of the program's may flush in the midst of a send
        self._reading = threading.RLock()
        self._told = False
        self._answers: deque[bytes] = deque(maxlen=_MAX_ANSWERS)
        self._switch: bool | None = None

    @property
    def connected(self) -> bool:
        """Whether there is a socket to send into."""
        return self._socket is not None

    @property
    def empty(self) -> bool:
        """Whether every frame has gone into the socket."""
        return not self._backlog and not self.deferred

    def greet_again(self) -> None:
        """Say hello once more before the next frame: what it says has changed."""
        self._greeted = False

    def attach(self, connection: socket.socket) -> None:
        """Send into this connection from now on; what waits goes first."""
        with self._lock:
            self._socket = connection
            self._inode = os.fstat(connection.fileno()).st_ino
            self._greeted = False
        self.drain()

    def defer(self, dropped: dict[str, int], make: Callable[..., frames.Frame], *args: Any) -> None:
        """Make a frame and send it with those to come: by whoever drains, before another frame is sent, or here.

        Here with the 128th, or when the first has waited for 250 ms: nobody has drained then. What is done once between
        two steps is dear: see `benchmarks/vllm_step_cost.py`. Never two are made at once, and they are made in the
        order in which they were deferred.

        Args:
            dropped: The drop counts in it, if any; should it be dropped, they go with a later one.
            make: Makes it of the arguments.
            args: What it is to say.
        """
        now_ns = perf_counter_ns()
        if not self.deferred:
            self.deferred_since_ns = now_ns
        self.deferred.append((dropped, make, args))
        if len(self.deferred) >= MOST_DEFERRED or now_ns - self.deferred_since_ns > DEFERRED_NS:
            self.send_deferred()

    def send_deferred(self) -> None:
        """Send what was deferred, in as few packets as it needs. A frame that can't be made or sent costs no other."""
        with self._lock:
            together: list[tuple[frames.Frame, dict[str, int]]] = []
            try:
                while self.deferred:
                    dropped, make, args = self.deferred.popleft()
                    try:
                        together.append((make(*args), dropped))
                    except BaseException as error:
                        outside = from_outside(error)
                        self._drop(semconv.INTERRUPTED if outside else semconv.INTERNAL_ERROR, dropped)
                        if outside:
                            raise
                        _log.debug("a frame could not be made", exc_info=True)
            finally:
                self._send_together(together)  # what was made before a signal handler raised too

    def _send_together(self, together: list[tuple[frames.Frame, dict[str, int]]]) -> None:
        if not together:
            return
        packet = b""
        try:
            packet = frames.encode(("several", [frame for frame, _ in together]))
        except Exception as error:
            if from_outside(error):
                raise
            _log.debug("%d frames could not be encoded", len(together), exc_info=True)
        if packet and len(packet) <= frames.MAX_FRAME_BYTES:
            dropped: dict[str, int] = {}
            for _, counts in together:
                add_up(dropped, counts)
            self._put(packet, dropped)
        elif len(together) > 1:
            half = len(together) // 2
            self._send_together(together[:half])
            self._send_together(together[half:])
        else:
            self._drop(semconv.BAD_FRAME, together[0][1])

    def send(self, frame: bytes, dropped: dict[str, int] = _NOTHING) -> None:
        """Send a frame now if the socket takes it, else later. The oldest are dropped when too many wait.

        Args:
            frame: One frame, encoded.
            dropped: The drop counts in it; should the frame be dropped, they go with a later one.
        """
        if len(frame) > frames.MAX_FRAME_BYTES:
            self._drop(semconv.BAD_FRAME, dropped)
            return
        with self._lock:
            if self.deferred:
                self.send_deferred()
            self._put(frame, dropped)

    def _put(self, packet: bytes, dropped: dict[str, int]) -> None:
        if not self._backlog and self._transmit(packet):
            return
        self._backlog.append((packet, dropped))
        self._backlog_bytes += len(packet)
        while self._backlog_bytes > MAX_BACKLOG_BYTES:
            oldest, counts = self._backlog.popleft()
            self._backlog_bytes -= len(oldest)
            self._drop(semconv.BACKLOG_FULL, counts, len(frames.frames_in(oldest)))

    def drain(self) -> None:
        """Send what was deferred, and what waits, as far as the socket takes it."""
        if self.deferred:
            self.send_deferred()
        while self._drain_some():
            pass

    def _drain_some(self) -> bool:
        """A few at a time: the model's thread may want the lock; whether there is more to try."""
        with self._lock:
            for _ in range(_FRAMES_PER_LOCK):
                if not self._backlog or not self._transmit(self._backlog[0][0]):
                    return False
                self._backlog_bytes -= len(self._backlog.popleft()[0])
        return True

    def hung_up(self) -> bool:
        """Whether the relay has closed the connection; then there is no connection any more."""
        connection = self._socket
        if connection is None:
            return False
        if not self._is_ours(connection):
            if connection is not self._socket:  # another thread of ours has closed it just now
                return False
            _log.warning("the program has closed the descriptor of the connection to the relay: it is made anew")
            self.close()
            return True
        # Not by reading: an answer that came too late for its flush may lie there, and hide the end behind it.
        poll = select.poll()
        try:
            poll.register(connection, select.POLLIN | select.POLLRDHUP)
            events = dict(poll.poll(0)).get(connection.fileno(), 0)
        except (OSError, ValueError):  # closed meanwhile
            return False
        self._told = bool(events & select.POLLIN)
        gone = bool(events & ~select.POLLIN)
        if gone:
            self.close()
        return gone

    def take_switch(self) -> bool | None:
        """Whether the relay wants capture on or off, if it has said so since the last call. Never blocks."""
        if self._told and self._reading.acquire(blocking=False):
            try:
                self._told = False
                packet = self._receive(0.0)
                if packet and not self._is_switch(packet):
                    self._answers.append(packet)  # to a flush that is about to wait for it, or does no longer
            finally:
                self._reading.release()
        wanted, self._switch = self._switch, None
        return wanted

    def receive(self, timeout_seconds: float) -> bytes:
        """The relay's next answer to a flush, or an empty string if none comes in time."""
        deadline = time.monotonic() + timeout_seconds
        with self._reading:
            while True:
                if self._answers:
                    return self._answers.popleft()
                packet = self._receive(max(0.0, deadline - time.monotonic()))
                if not packet or not self._is_switch(packet):
                    return packet

    def _is_switch(self, packet: bytes) -> bool:
        if not packet.startswith(frames.SWITCH_BEGINS):
            return False
        self._switch = frames.decode_switch(packet).on
        return True

    def _receive(self, timeout_seconds: float) -> bytes:
        connection = self._socket
        if connection is None:
            return b""
        try:
            poll = select.poll()  # not select(): a server's descriptors may lie above its limit
            poll.register(connection, select.POLLIN)
            readable = poll.poll(min(max(0.0, timeout_seconds), _MAX_WAIT_SECONDS) * 1000)
            return connection.recv(frames.MAX_FRAME_BYTES, socket.MSG_DONTWAIT) if readable else b""
        except (OSError, ValueError):  # closed meanwhile
            return b""

    def close(self) -> None:
        """Close the connection; what is in the socket still reaches the relay, what waits is kept."""
        with self._lock:
            connection, self._socket = self._socket, None
        self._let_go_of(connection)

    def abandon(self) -> None:
        """In a forked child: close the parent's socket here, so that only the parent holds it open."""
        connection, self._socket = self._socket, None
        self._let_go_of(connection)

    def _let_go_of(self, connection: socket.socket | None) -> None:
        if connection is None:
            return
        if self._is_ours(connection):
            connection.close()
        else:
            connection.detach()

    def _is_ours(self, connection: socket.socket) -> bool:
        try:
            return os.fstat(connection.fileno()).st_ino == self._inode
        except OSError:
            return False

    def _drop(self, reason: str, counts: dict[str, int], number: int = 1) -> None:
        self._drops.add(reason, number)
        if counts:
            self._drops.put_back(counts)

    def _transmit(self, frame: bytes) -> bool:
        connection = self._socket
        if connection is None:
            return False
        if not self._greeted:
            self._greeted = sent(connection, frames.encode(self._hello()))
        return self._greeted and sent(connection, frame)


def sent(connection: socket.socket, packet: bytes) -> bool:
    """Send it now, if the socket takes it: it may be full, or nobody there. Whether it did; never blocks."""
    count: int = _send(connection.fileno(), packet, len(packet), _SEND_FLAGS)
    return count >= 0
