"""Finds the sessions of this user that run on this host, and connects to one."""

from __future__ import annotations

import contextlib
import os
import re
import select
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from otel_npu.wire import frames, looking, rendezvous

if TYPE_CHECKING:
    from collections.abc import Iterator

_ANSWER_SECONDS: Final = 10.0
_NEXT_ANSWER_SECONDS: Final = 30.0  # all that it has passed on comes before it
_NOBODY: Final = "no session of user {} runs on this host: a program runs in one where OTEL_NPU_ENABLED is set"
_RECEIVE_BUFFER_BYTES: Final = 4 * 1024 * 1024
_UNIX_SOCKETS: Final = Path("/proc/net/unix")


class LookError(Exception):
    """There is nothing to look at, or no longer; the message says why, in one line."""


class Connection:
    """A connection to the relay of one session, through which one looks.

    Args:
        session: The session's id.
        connection: To its relay.

    Attributes:
        state: Who is there, as the relay has said last.

    Raises:
        LookError: Its relay has gone.
    """

    state: looking.Session

    def __init__(self, session: str, connection: socket.socket) -> None:
        self.session = session
        self._connection = connection
        self._waiting: list[looking.View] = []
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER_BYTES)
        connection.setblocking(False)
        self._send(frames.Look(frames.PROTOCOL))

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Look no longer."""
        self._connection.close()

    def ask(self, *, follow: bool = False, seconds: float = _NEXT_ANSWER_SECONDS) -> looking.Session:
        """Who is there now; with `follow` all that is sent comes from now on.

        Args:
            follow: Whether that is wanted.
            seconds: How long the relay may take to answer.

        Raises:
            LookError: Nobody answers.
        """
        self._send(frames.Look(frames.PROTOCOL, follow))
        return self.answer(time.monotonic() + seconds)

    def answer(self, deadline: float) -> looking.Session:
        """What the relay answers, by then at the latest.

        Raises:
            LookError: It does not.
        """
        while True:
            view = self._receive(max(0.0, deadline - time.monotonic()))
            if isinstance(view, looking.Session):
                self.state = view
                return view
            if view is not None:
                self._waiting.append(view)
            elif time.monotonic() >= deadline:
                raise LookError(
                    f"the relay of session {self.session} does not answer: it is stopped, or of another version"
                )

    def switch(self, *, on: bool) -> None:
        """Have all processes of the session capture, or capture nothing.

        Raises:
            LookError: The relay has gone.
        """
        self._send(frames.Switch(on))

    def views(self, seconds: float) -> Iterator[looking.View]:
        """What comes in so many seconds.

        Raises:
            LookError: The relay has gone.
        """
        deadline = time.monotonic() + seconds
        while True:
            waiting, self._waiting = self._waiting, []
            yield from waiting
            view = self._receive(max(0.0, deadline - time.monotonic()))
            if view is not None:
                yield view
            elif time.monotonic() >= deadline:
                return

    def _send(self, frame: frames.Frame) -> None:
        try:
            self._connection.send(frames.encode(frame), socket.MSG_NOSIGNAL)
        except OSError as error:
            raise self._gone() from error

    def _receive(self, seconds: float) -> looking.View | None:
        poll = select.poll()
        poll.register(self._connection, select.POLLIN)
        if not poll.poll(seconds * 1000):
            return None
        try:
            packet = self._connection.recv(looking.MAX_PACKET_BYTES)
        except BlockingIOError:
            return None
        except OSError as error:
            raise self._gone() from error
        if not packet:
            raise self._gone()
        try:
            return looking.decode(packet)
        except msgspec.MsgspecError:  # such as a switch that was meant for processes
            return None

    def _gone(self) -> LookError:
        return LookError(f"session {self.session} has ended, or its relay was killed: nobody is there any more")


def connect(session: str | None = None, pid: int | None = None) -> Connection:
    """The session that is meant: the one with this id or with this process, or the only one there is.

    Raises:
        LookError: There is none, or there are several; the message says which.
    """
    found = sessions()
    if session is not None:
        found = {name: path for name, path in found.items() if name == session}
        if not found:
            raise LookError(f"there is no session {session!r} of user {os.getuid()} on this host{_which(sessions())}")
    if not found:
        raise LookError(_NOBODY.format(os.getuid()))
    connections = _connections(found)
    if pid is not None:
        connections = _with_process(connections, pid)
        if not connections:
            raise LookError(f"no session has a process {pid}{_which(found)}")
    if not connections:
        raise LookError(_NOBODY.format(os.getuid()))
    if len(connections) > 1:
        which = "; ".join(_described(connection) for connection in connections)
        for connection in connections:
            connection.close()
        raise LookError(f"several sessions run here, choose one by --session or --pid: {which}")
    return connections[0]


def sessions() -> dict[str, Path | None]:
    """The ids of this user's sessions, and where their sockets are; None for a name in the abstract namespace alone."""
    ours = re.escape(f"otel-npu-{os.getuid()}")
    found: dict[str, Path | None] = {}
    with contextlib.suppress(OSError):
        for line in _UNIX_SOCKETS.read_text(errors="replace").splitlines():
            words = line.split(None, 7)
            name = words[7] if len(words) > 7 else ""  # noqa: PLR2004  its eighth column
            abstract = re.fullmatch(rf"@{ours}-([0-9a-f]{{16}})", name)
            if abstract is not None:
                found.setdefault(abstract[1], None)
            path = re.fullmatch(rf"(/.*/{ours})/([A-Za-z0-9_-]{{1,32}})\.sock", name)
            if path is not None:
                found[path[2]] = Path(name)
    folder = rendezvous.socket_folder()  # one that another container has put there is in no list of the kernel's
    with contextlib.suppress(OSError):
        for entry in sorted(folder.glob("*.sock")):
            found[entry.stem] = entry
    return found


def _connections(found: dict[str, Path | None]) -> list[Connection]:
    """Connections to those that answer.

    Raises:
        LookError: None does; the message says why one does not.
    """
    asked: list[Connection] = []
    why: LookError | None = None
    for session, path in found.items():
        try:
            connection = rendezvous.reach(session, path)
            if connection is not None:
                asked.append(Connection(session, connection))
            elif len(found) == 1:
                why = LookError(f"nobody answers in session {session}: its relay has gone")
        except OSError as error:
            why = LookError(f"session {session} is not for user {os.getuid()}: {error}")
        except LookError as error:
            why = error
    answered = []
    deadline = time.monotonic() + _ANSWER_SECONDS
    for each in asked:
        try:
            each.answer(deadline)
            answered.append(each)
        except LookError as error:
            each.close()
            why = error
    if not answered and why is not None:
        raise why
    return answered


def _with_process(connections: list[Connection], pid: int) -> list[Connection]:
    """Those with this process, or with one that descends from it; the others are closed."""
    chosen = []
    for connection in connections:
        pids = {connection.state.pid, *(process.pid for process in connection.state.processes)}
        if any(pid in _ancestry(each) for each in pids):
            chosen.append(connection)
        else:
            connection.close()
    return chosen


def _ancestry(pid: int) -> Iterator[int]:
    """A process, its parent, and so on."""
    while pid > 1:
        yield pid
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            return


def _which(found: dict[str, Path | None]) -> str:
    return f"; there are {', '.join(sorted(found))}" if found else "; there is none"


def _described(connection: Connection) -> str:
    processes = connection.state.processes
    names = sorted({process.service_name for process in processes if process.service_name})
    pids = ", ".join(str(process.pid) for process in processes)
    return f"{connection.session} ({' '.join([*names, 'with processes', pids]) if pids else 'nobody in it'})"
