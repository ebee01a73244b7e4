"""Starts the relay: with an interpreter that is one, with the modules that the program has, as nobody's child."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator, Mapping, Sequence

# The processors of the process that made the session, in hexadecimal. Its children inherit it; other hosts, to which
# variables are copied by their prefix, do not.
CPU_MASK: Final = "_OTEL_NPU_CPU_MASK"
# By these OpenMP pins whichever process it is loaded into, and an engine may preload it into all.
_PINNING: Final = frozenset({"GOMP_CPU_AFFINITY", "KMP_AFFINITY", "OMP_PLACES", "OMP_PROC_BIND"})
_INTERPRETER: Final = re.compile(r"(python|pypy)[\d.]*[a-z]*")
_starters: list[subprocess.Popen[bytes]] = []
"""Those that had not ended when nobody waited for their relay any more."""
SERVING: Final = b"serving\n"
"""What a relay says of itself, after the number of its process, once it reads."""

APART: Final[dict[str, Any]] = {"process_group": 0} if sys.version_info >= (3, 11) else {"start_new_session": True}
"""What starts a process to which a terminal's keys do nothing, and whose children can be killed with it.

Not by a session of its own, where it can be helped: see `relay.__main__.Life.begin` on what that costs.
"""


class NoInterpreterError(Exception):
    """There is no Python interpreter here that could run the relay; the message says what there is instead."""


class StartedRelay:
    """A relay that was started here, and is no child of this process.

    Who stops a server by killing all that descends from it, as vLLM does with its engine, would else kill the relay
    with the last spans in it.

    Args:
        life: The reading end of a pipe whose other end lives as long as the relay.
        starter: The process that became the relay's parent, and ends at once.
    """

    def __init__(self, life: int, starter: subprocess.Popen[bytes]) -> None:
        os.set_blocking(life, False)
        self._life = life
        self._inode = os.fstat(life).st_ino
        self._starter = starter
        self._said = b""

    @property
    def pid(self) -> int | None:
        """Its process; None as long as it has not said which it is."""
        words = self._listen().split(b"\n")
        return int(words[0]) if len(words) > 1 else None

    @property
    def serving(self) -> bool:
        """Whether it has begun to read, ever."""
        return SERVING in self._listen()

    def wait(self, timeout_seconds: float) -> bool:
        """Wait for its end, so long at most; whether it has ended."""
        self._starter.poll()  # so that no zombie is left
        if not self._is_ours():
            return True
        poll = select.poll()
        poll.register(self._life, 0)  # its end, not what it says
        return bool(poll.poll(max(0.0, timeout_seconds) * 1000))

    def close(self) -> None:
        """Wait for it no more."""
        if self._starter.poll() is None:  # on a busy machine; whoever starts the next one lets go of it
            _starters.append(self._starter)
        if self._is_ours():
            os.close(self._life)

    def _is_ours(self) -> bool:
        """Whether the program has left our descriptor alone: closed by it, the number may stand for something else."""
        try:
            return os.fstat(self._life).st_ino == self._inode
        except OSError:
            return False

    def _listen(self) -> bytes:
        if self._is_ours():
            with contextlib.suppress(BlockingIOError):
                self._said += os.read(self._life, 64)
        return self._said


def start(listeners: Sequence[socket.socket], path: Path | None, more: Mapping[str, str]) -> StartedRelay:
    """Start a relay on these sockets.

    Args:
        listeners: Listen already.
        path: The name of one of them, if it has one.
        more: What the relay's environment has beside this process's, or in its place.

    Raises:
        NoInterpreterError: Nothing here can run it.
        OSError: It can't be started.
    """
    _starters[:] = [starter for starter in _starters if starter.poll() is None]
    python = interpreter()
    descriptors = [listener.fileno() for listener in listeners]
    life, relays_end = os.pipe()
    command = [python, "-m", "otel_npu.relay", "--life", str(relays_end)]
    for descriptor in descriptors:
        command += ["--listener", str(descriptor)]
    if path is not None:
        command += ["--socket", str(path)]
    try:
        with _where_the_session_began(), _deaf_to_the_terminal():
            starter = subprocess.Popen(  # noqa: S603
                command,
                pass_fds=[*descriptors, relays_end],
                stdin=subprocess.DEVNULL,
                env=_environment(more),
                **APART,
            )
        return StartedRelay(life, starter)
    except (OSError, ValueError) as error:
        os.close(life)
        raise OSError(f"the relay can't be started: {error}") from error
    finally:
        os.close(relays_end)


def interpreter() -> str:
    """The interpreter that runs this program, or one just like it. Nothing else is ever run.

    In a frozen program, in uWSGI and in programs that embed Python `sys.executable` is the program itself.

    Raises:
        NoInterpreterError: There is none.
    """
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    candidates = [] if getattr(sys, "frozen", False) else [sys.executable or ""]
    candidates += [os.path.join(prefix, "bin", name) for prefix in (sys.exec_prefix, sys.base_exec_prefix)]  # noqa: PTH118
    for candidate in candidates:
        path = Path(candidate)
        if _INTERPRETER.fullmatch(path.name) and path.is_file() and os.access(path, os.X_OK):
            return candidate
    raise NoInterpreterError(f"sys.executable is {sys.executable!r}, and {candidates[-1]} is not there")


def module_path(path: Sequence[object], working_directory: str, program: str | None) -> list[str]:
    """Where the relay finds modules: where the program does, and what `otel_npu` itself lies in.

    The folders of the program's own modules come last, so that they take the place of nothing that the relay needs.

    Args:
        path: The program's `sys.path`.
        working_directory: Its working directory, an empty entry.
        program: The file that it runs, if it runs one.
    """
    own = {working_directory, *([str(Path(program).resolve().parent)] if program else [])}
    given = [os.path.normpath(os.path.join(working_directory, entry)) for entry in path if isinstance(entry, str)]  # noqa: PTH118
    given.append(str(Path(__file__).parents[2]))
    entries = [entry for entry in dict.fromkeys(given) if os.path.isabs(entry) and os.pathsep not in entry]  # noqa: PTH117
    return [entry for entry in entries if entry not in own] + [entry for entry in entries if entry in own]


def _environment(more: Mapping[str, str]) -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if name not in _PINNING} | dict(more)
    environment["OTEL_NPU_ENABLED"] = "0"
    # The working directory stays, because exporters take relative paths, but must not shadow modules.
    environment["PYTHONSAFEPATH"] = "1"
    program = getattr(sys.modules.get("__main__"), "__file__", None)
    environment["PYTHONPATH"] = os.pathsep.join(module_path(sys.path, _working_directory(), program))
    return environment


def _working_directory() -> str:
    try:
        return os.getcwd()  # noqa: PTH109
    except OSError:  # it has been removed
        return ""


def cpu_mask() -> str:
    """The processors on which the session's first process could run when it began."""
    return os.environ.setdefault(CPU_MASK, f"{sum(1 << cpu for cpu in os.sched_getaffinity(0)):x}")


@contextlib.contextmanager
def _deaf_to_the_terminal() -> Iterator[None]:
    """Block, for the moment, what a terminal sends: what this thread starts never hears of it.

    SIGHUP comes without a terminal too: to a process that is stopped, when the one that has started it ends.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP, signal.SIGTTOU})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _where_the_session_began() -> Iterator[None]:
    """Let this thread run, for the moment, where the session began: what it starts inherits that.

    Engines, and OpenMP, pin a worker to a processor and let it wait there by spinning, beside which the relay would get
    no time at all. (Nor did it anywhere as a batch process.)
    """
    before = os.sched_getaffinity(0)
    with contextlib.suppress(OSError, ValueError):  # forbidden, or the mask names none that are here
        mask = int(cpu_mask(), 16)
        wanted = {cpu for cpu in range(mask.bit_length()) if mask >> cpu & 1}
        if wanted != before:
            os.sched_setaffinity(0, wanted)
    try:
        yield
    finally:
        if os.sched_getaffinity(0) != before:
            os.sched_setaffinity(0, before)
