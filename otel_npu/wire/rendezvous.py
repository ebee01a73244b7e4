"""Where a process tree meets its relay: a session id, a private folder, a lock, and a socket.

The first process that enables tracing makes the session id and puts it into its environment; its children inherit
it. Whoever finds no relay behind the session's socket binds that socket itself and hands it to a new relay, already
listening: frames can be sent at once and wait in the kernel while the relay starts.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import select
import socket
import stat
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

from otel_npu.settings import SESSION

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

# The processors of the process that made the session, in hexadecimal. Its children inherit it; other hosts, to which
# variables are copied by their prefix, do not.
_CPU_MASK: Final = "_OTEL_NPU_CPU_MASK"
# By these OpenMP pins whichever process it is loaded into, and an engine may preload it into all.
_PINNING: Final = frozenset({"GOMP_CPU_AFFINITY", "KMP_AFFINITY", "OMP_PLACES", "OMP_PROC_BIND"})
# A process of its own that starts the relay and ends at once: so nobody is the relay's parent. The relay runs
# where the session began and not where its starter does: engines, and OpenMP, pin a worker to a processor and let it
# wait there by spinning, beside which the relay got no time at all. (Nor did it anywhere as a batch process.)
_DETACH: Final = """
import os, sys
life, mask, relay = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
if os.fork():
    os._exit(0)
os.setsid()
try:
    mask = int(mask, 16)
    os.sched_setaffinity(0, [cpu for cpu in range(mask.bit_length()) if mask >> cpu & 1])
except (OSError, ValueError):
    pass  # forbidden, or it names none that are here: the relay runs where its starter does
os.write(life, b"%d" % os.getpid())
os.execv(relay[0], relay)
"""
_START_SECONDS: Final = 30.0
SEND_BUFFER_BYTES: Final = 2 * 1024 * 1024
_BACKLOG: Final = 128
_PEER_CREDENTIALS: Final = struct.Struct("iII")


class RendezvousError(OSError):
    """The folder or the peer can't be trusted; the message says which and why."""


def session_id() -> str:
    """This process tree's session id; the first to ask makes it and leaves it in the environment.

    Raises:
        RendezvousError: The variable holds what can't be part of a file's name.
    """
    session = os.environ.get(SESSION, "")
    if not session:
        session = os.environ[SESSION] = secrets.token_hex(8)
    _cpu_mask()
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,32}", session):
        raise RendezvousError(f"{SESSION}={session!r}: takes 1 to 32 letters, digits, '_' or '-'")
    return session


def _cpu_mask() -> str:
    """The processors on which the session's first process could run when it began."""
    return os.environ.setdefault(_CPU_MASK, f"{sum(1 << cpu for cpu in os.sched_getaffinity(0)):x}")


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
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise RendezvousError(f"{folder} must be a folder of user {os.getuid()} with mode 0700, and is not")


def socket_path(session: str) -> Path:
    """The session's socket, in a folder that only this user can enter.

    Raises:
        RendezvousError: The folder exists and belongs to somebody else or lets others in.
    """
    folder = socket_folder()
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    check_private(folder)
    return folder / f"{session}.sock"


@contextlib.contextmanager
def session_lock(path: Path) -> Iterator[None]:
    """Held by whoever makes or removes a session's socket."""
    # One for all sessions, and it stays: to remove a lock file is to let two hold it.
    with path.with_name("lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def connect(path: Path) -> socket.socket | None:
    """A connection to the session's relay, or None when there is none.

    Raises:
        RendezvousError: Another user listens there.
        BlockingIOError: There is one, and more processes wait for it than its backlog holds.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        connection.setblocking(False)
        connection.connect(str(path))
        check_peer(connection)
    except (FileNotFoundError, ConnectionRefusedError):
        connection.close()
        return None
    except BaseException:
        connection.close()
        raise
    return connection


def check_peer(connection: socket.socket) -> None:
    """Both ends take only processes of the same user.

    Raises:
        RendezvousError: The peer is another user's.
    """
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
    _pid, uid, _gid = _PEER_CREDENTIALS.unpack(credentials)
    if uid != os.getuid():
        raise RendezvousError(f"the other end of the socket is user {uid}, not {os.getuid()}")


def listen(path: Path) -> socket.socket:
    """A new listening socket at the path, replacing one that nobody listens on. Hold the session's lock."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        listener.bind(str(path))
        listener.listen(_BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


def withdraw(path: Path) -> None:
    """Take the socket's name away: from now on whoever needs a relay starts another."""
    with session_lock(path):
        path.unlink(missing_ok=True)


class StartedRelay:
    """A relay that was started here, and is no child of this process.

    Who stops a server by killing all that descends from it, as vLLM does with its engine, would else kill the relay
    with the last spans in it.

    Attributes:
        pid: Its process.
    """

    def __init__(self, life: int) -> None:
        self._life = life
        """The reading end of a pipe whose other end lives as long as the relay."""
        self.pid = int(os.read(life, 32))

    def wait(self, timeout_seconds: float) -> bool:
        """Wait for its end, so long at most; whether it has ended."""
        poll = select.poll()
        poll.register(self._life, select.POLLIN)
        return bool(poll.poll(max(0.0, timeout_seconds) * 1000))

    def close(self) -> None:
        """Wait for it no more."""
        os.close(self._life)


def connect_or_start(
    path: Path, environment: Mapping[str, str] | None = None
) -> tuple[socket.socket, StartedRelay | None]:
    """A connection to the session's relay, and the relay if it was started here.

    Args:
        path: The session's socket.
        environment: What a relay that is started here has beside this process's environment, or in its place.

    Raises:
        RendezvousError: The folder or the peer can't be trusted.
        OSError: The socket can't be made or the relay can't be started.
    """
    connection = connect(path)
    if connection is not None:
        return connection, None
    with session_lock(path):
        connection = connect(path)
        if connection is not None:
            return connection, None
        with listen(path) as listener:
            relay = _start(listener, path, environment or {})
            connection = connect(path)
    if connection is None:
        raise RendezvousError(f"the relay's socket {path} took no connection")
    return connection, relay


def _start(listener: socket.socket, path: Path, more: Mapping[str, str]) -> StartedRelay:
    environment = {name: value for name, value in os.environ.items() if name not in _PINNING} | dict(more)
    environment["OTEL_NPU_ENABLED"] = "0"
    # The working directory stays, because exporters take relative paths, but must not shadow modules.
    environment["PYTHONSAFEPATH"] = "1"
    package_root = str(Path(__file__).parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), package_root)))
    relay = [sys.executable, "-m", "otel_npu.relay", "--listener", str(listener.fileno()), "--socket", str(path)]
    life, relays_end = os.pipe()
    try:
        subprocess.run(  # noqa: S603
            [sys.executable, "-I", "-S", "-c", _DETACH, str(relays_end), _cpu_mask(), *relay],
            pass_fds=[listener.fileno(), relays_end],
            stdin=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
            check=True,
            timeout=_START_SECONDS,
        )
        return StartedRelay(life)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        os.close(life)
        raise RendezvousError(f"the relay can't be started: {error}") from error
    finally:
        os.close(relays_end)
