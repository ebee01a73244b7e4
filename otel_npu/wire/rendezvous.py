"""Where a process tree meets its relay: a session id, a private folder, a lock, and a socket.

The first process that enables tracing makes the session id and puts it into its environment; its children inherit
it. Whoever finds no relay behind the session's socket binds that socket itself and hands it to a new relay, already
listening: frames can be sent at once and wait in the kernel while the relay starts.

A session that was made up has a name in the kernel's abstract namespace too. By that its children find it whatever
becomes of the folder: they may have another `XDG_RUNTIME_DIR` or `TMPDIR`, or it may be removed under them.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
import struct
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from otel_npu.settings import SESSION
from otel_npu.wire.folder import PrivateFolder, RendezvousError
from otel_npu.wire.start import StartedRelay, cpu_mask, start

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ("RendezvousError", "StartedRelay")

SEND_BUFFER_BYTES: Final = 2 * 1024 * 1024
_BACKLOG: Final = 128
_PEER_CREDENTIALS: Final = struct.Struct("iII")
_MADE_UP: Final = re.compile(r"[0-9a-f]{16}")


class NoPlaceError(RendezvousError):
    """There is no place here where a socket could lie; the message says why."""


class Meeting(NamedTuple):
    """A connection to the session's relay."""

    connection: socket.socket
    relay: StartedRelay | None = None
    """The relay, if it was started here."""
    instead: str = ""
    """Why its socket is not where it should be, and where it is; for whoever started it to say."""


def session_id() -> str:
    """This process tree's session id; the first to ask makes it and leaves it in the environment.

    Raises:
        RendezvousError: The variable holds what can't be part of a file's name.
    """
    session = os.environ.get(SESSION, "")
    if not session:
        session = os.environ[SESSION] = os.urandom(8).hex()
    cpu_mask()
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,32}", session):
        raise RendezvousError(f"{SESSION}={session!r}: takes 1 to 32 letters, digits, '_' or '-'")
    return session


def socket_folder() -> Path:
    """Where this user's sockets lie, or would: nothing is made.

    Raises:
        FileNotFoundError: There is no folder for temporary files.
    """
    base = os.environ.get("XDG_RUNTIME_DIR")
    if not base or not os.access(base, os.W_OK):
        base = tempfile.gettempdir()
    return Path(base, f"otel-npu-{os.getuid()}")


def check_private(folder: Path) -> None:
    """Only this user may enter a folder that sockets lie in.

    Raises:
        FileNotFoundError: There is none.
        RendezvousError: It belongs to somebody else or lets others in.
    """
    PrivateFolder(folder).close()


def socket_path(session: str) -> Path:
    """The session's socket, in a folder that only this user can enter.

    Raises:
        RendezvousError: The folder exists and belongs to somebody else or lets others in.
    """
    folder = socket_folder()
    PrivateFolder(folder, make=True).close()
    return folder / f"{session}.sock"


@contextlib.contextmanager
def session_lock(path: Path) -> Iterator[None]:
    """Held by whoever makes or removes a session's socket.

    Raises:
        RendezvousError: The folder can't be trusted, or its lock is held by somebody else for too long.
    """
    with PrivateFolder(path.parent) as folder, folder.locked():
        yield


def connect(path: Path) -> socket.socket | None:
    """A connection to the session's relay, or None when there is none.

    Raises:
        RendezvousError: The folder can't be trusted, or another user listens there.
        BlockingIOError: There is one, and more processes wait for it than its backlog holds.
    """
    try:
        with PrivateFolder(path.parent) as folder:
            return _connect(folder.address(path.name))
    except FileNotFoundError:
        return None


def reach(session: str, path: Path | None) -> socket.socket | None:
    """A connection to the relay of a session that is there, at this path or by its abstract name; None if it is gone.

    Raises:
        RendezvousError: It is another user's.
    """
    found = None if path is None else connect(path)
    return _connect_abstract(session) if found is None else found


def check_peer(connection: socket.socket) -> None:
    """Both ends take only processes of the same user.

    Raises:
        RendezvousError: The peer is another user's.
    """
    _, uid = _peer(connection)
    if uid != os.getuid():
        raise RendezvousError(f"the other end of the socket is user {uid}, not {os.getuid()}")


def listen(path: Path) -> socket.socket:
    """A new listening socket at the path, replacing one that nobody listens on. Hold the session's lock."""
    with PrivateFolder(path.parent) as folder:
        folder.remove_socket(path.name)
        listener = _listen(folder.address(path.name))
        try:
            folder.restrict(path.name)  # whatever the umask
        except BaseException:
            listener.close()
            raise
    return listener


def withdraw(path: Path) -> None:
    """Take away the name of a socket on which nobody listens any more, if that can be done."""
    # The folder may be gone or locked: then a name stays behind that leads nowhere.
    with contextlib.suppress(OSError), session_lock(path):
        other = connect(path)
        if other is None:
            with PrivateFolder(path.parent) as folder:
                folder.remove_socket(path.name)
        else:
            other.close()  # somebody else's by now


def connect_or_start(path: Path, environment: Mapping[str, str] | None = None) -> Meeting:
    """A connection to the relay whose socket has this path, which is started if there is none.

    Args:
        path: The session's socket.
        environment: What a relay that is started here has beside this process's environment, or in its place.

    Raises:
        RendezvousError: The folder or the peer can't be trusted.
        OSError: The socket can't be made or the relay can't be started.
    """
    place = _place_at(path)
    if not _listens(place):
        return Meeting(place)
    return _start([place], path, environment or {})


def meet(session: str, environment: Mapping[str, str] | None = None) -> Meeting:
    """A connection to the session's relay, which is started if there is none.

    Args:
        session: The session's id.
        environment: As for `connect_or_start`.

    Raises:
        NoPlaceError: There is no place for a socket.
        OSError: As for `connect_or_start`; it may be better later.
    """
    found = _find(session)
    if found is not None:
        return Meeting(found)
    complaints: list[str] = []
    with contextlib.ExitStack() as closing:
        listeners: list[socket.socket] = []
        if _MADE_UP.fullmatch(session):
            # Whoever gets this name is the one who starts the relay: the others wait for it there.
            with contextlib.suppress(OSError):
                listeners.append(closing.enter_context(_listen(_abstract(session))))
            found = None if listeners else _find(session)
            if found is not None:
                return Meeting(found)
        path, place = _first_place(session, complaints)
        if place is None and not listeners:
            place = _abstract_place(session, complaints)
        if place is not None and _listens(place):
            listeners.append(closing.enter_context(place))
        elif place is not None:
            return Meeting(place)
        closing.pop_all()
        meeting = _start(listeners, path, environment or {})
    instead = "; ".join(complaints)
    return meeting._replace(instead=f"{instead}; the relay's socket is {_name(path)}" if instead else "")


def _find(session: str) -> socket.socket | None:
    """A connection to the relay of this session, wherever its socket is."""
    for folder in _folders():
        with contextlib.suppress(RendezvousError, PermissionError):  # it is not for us
            found = connect(folder / f"{session}.sock")
            if found is not None:
                return found
    return _connect_abstract(session)


def _folders() -> list[Path]:
    """Where the sockets of this user may lie, the best first."""
    name = f"otel-npu-{os.getuid()}"
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    bases = [runtime] if runtime and os.access(runtime, os.W_OK) else []
    with contextlib.suppress(OSError):
        bases.append(tempfile.gettempdir())
    return [Path(base, name) for base in dict.fromkeys(bases)]


def _first_place(session: str, complaints: list[str]) -> tuple[Path | None, socket.socket | None]:
    """A listening socket in the first folder in which there can be one, or a connection if somebody listens there."""
    folders = _folders()
    if not folders:
        complaints.append("there is no folder that can be written to")
    for folder in folders:
        path = folder / f"{session}.sock"
        try:
            PrivateFolder(folder, make=True).close()
            return path, _place_at(path)
        except BlockingIOError:
            raise
        except OSError as error:
            complaints.append(_why(error, folder))
    return None, None


def _why(error: OSError, folder: Path) -> str:
    return str(error) if isinstance(error, RendezvousError) else f"no socket can be made in {folder}: {error.strerror}"


def _place_at(path: Path) -> socket.socket:
    """A connection to whoever listens at this path or, if nobody does, a listening socket."""
    found = connect(path)
    if found is not None:
        return found
    with session_lock(path):
        return connect(path) or listen(path)


def _start(listeners: list[socket.socket], path: Path | None, environment: Mapping[str, str]) -> Meeting:
    """Start a relay on these sockets, which are closed here, and connect to it first of all."""
    with contextlib.ExitStack() as closing:
        for listener in listeners:
            closing.enter_context(listener)
        connection = _connect(listeners[0].getsockname()) if path is None else connect(path)
        if connection is None:
            raise RendezvousError(f"the relay's socket {_name(path)} took no connection")
        try:
            return Meeting(connection, start(listeners, path, environment))
        except BaseException:
            connection.close()
            raise


def _listens(place: socket.socket) -> bool:
    return bool(place.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def _abstract(session: str) -> str:
    return f"\0otel-npu-{os.getuid()}-{session}"


def _abstract_place(session: str, complaints: list[str]) -> socket.socket:
    """A listening socket in the abstract namespace, for want of a folder.

    Raises:
        NoPlaceError: There can be none either.
        BlockingIOError: A relay that is about to end has it still.
    """
    try:
        return _listen(_abstract(session))
    except OSError as error:
        complaints.append(f"nor an abstract one: {error.strerror}")
        if error.errno == errno.EADDRINUSE:
            raise BlockingIOError("; ".join(complaints)) from None
        raise NoPlaceError("; ".join(complaints)) from None


def _connect_abstract(session: str) -> socket.socket | None:
    """A connection to the relay of the session's abstract name; None if there is none, or one that is not ours."""
    connection = None
    with contextlib.suppress(OSError):
        connection = _connect(_abstract(session))
    if connection is not None and not _peer(connection)[0]:  # in another container, which shares the network alone
        connection.close()
        return None
    return connection


def _connect(address: str) -> socket.socket | None:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        connection.setblocking(False)
        connection.connect(address)
        check_peer(connection)
    except (FileNotFoundError, ConnectionRefusedError):
        connection.close()
        return None
    except BaseException:
        connection.close()
        raise
    return connection


def _listen(address: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        listener.bind(address)
        listener.listen(_BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


def _peer(connection: socket.socket) -> tuple[int, int]:
    """Process and user of the other end; 0 for a process that can't be seen from here."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
    pid, uid, _gid = _PEER_CREDENTIALS.unpack(credentials)
    return pid, uid


def _name(path: Path | None) -> str:
    return "an abstract one" if path is None else str(path)
