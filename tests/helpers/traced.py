"""Traced programs as processes of their own, and the relay that they start."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from otel_npu.relay.server import DRAIN_SECONDS
from tests.helpers import REPOSITORY

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

PATIENCE_SECONDS = 120.0
MEASURED = "COVERAGE_PROCESS_CONFIG" in os.environ
"""Whether it is found out what of the code the tests reach."""

# A worker does what it is told, one line at a time, and answers each line. At the end of its input it exits orderly.
WORKER = '''\
import fcntl, json, os, struct, sys, termios, time
import otel_npu

def steps(count, kind="decode"):
    for _ in range(count):
        with otel_npu.step(kind):
            with otel_npu.stage("forward"):
                pass
    return count

def large_steps(count):
    """40 kB each."""
    for _ in range(count):
        with otel_npu.step("decode", text=["x" * 4000] * 10):
            pass
    return count

def step_time_ns(count):
    """The median time that a step takes the program."""
    took = []
    for _ in range(count):
        began = time.perf_counter_ns()
        steps(1)
        took.append(time.perf_counter_ns() - began)
    return sorted(took)[count // 2]

def recorder():
    from otel_npu.capture import switch
    return switch.current_recorder()

def all_is_sent():
    """Whether all steps that are closed are in the socket: they are sent several at once."""
    return not any(thread.pending or thread.busy for thread in recorder().threads) and recorder().channel.empty

def all_is_read():
    """Whether all steps are sent, and the relay has read them."""
    unread = fcntl.ioctl(recorder().channel._socket.fileno(), termios.TIOCOUTQ, bytes(4))
    return all_is_sent() and struct.unpack("i", unread) == (0,)

if __name__ == "__main__":
    for line in sys.stdin:
        try:
            answer = eval(line)
        except BaseException as error:
            answer = repr(error)
        print(json.dumps(answer), flush=True)
'''


def eventually(condition: Callable[[], Any], what: str, seconds: float = PATIENCE_SECONDS) -> Any:
    """What the condition gives, once that is true.

    To look takes a third of the time at most: meanwhile a receiver in this process is kept from its work.

    Raises:
        AssertionError: It did not become true in time.
    """
    deadline = time.monotonic() + seconds
    while True:
        began = time.monotonic()
        if found := condition():
            return found
        now = time.monotonic()
        assert now < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(max(0.01, 2 * (now - began)))


class Program:
    """A running program that is spoken to in lines."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self.process = process
        self._log = log
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()

    @property
    def pid(self) -> int:
        return self.process.pid

    def tell(self, expression: str) -> None:
        """Have it evaluate an expression, without waiting."""
        assert self.process.stdin is not None
        self.process.stdin.write(expression + "\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        """Its next answer."""
        return json.loads(self.line())

    def line(self) -> str:
        """The next line that it, or its relay, prints.

        Raises:
            AssertionError: There is none, or none in time.
        """
        with contextlib.suppress(queue.Empty):
            if line := self._lines.get(timeout=PATIENCE_SECONDS):
                return line
        raise AssertionError(f"no line; exit code {self.process.poll()}; the log: {self._log.read_text()[-4000:]}")

    def ask(self, expression: str) -> Any:
        """What an expression is over there."""
        self.tell(expression)
        return self.answer()

    def leave(self) -> float:
        """Have it exit; how many seconds that took."""
        began = time.monotonic()
        assert self.process.stdin is not None
        self.process.stdin.close()
        code = self.process.wait(PATIENCE_SECONDS)
        assert code == 0, f"exit code {code}"
        return time.monotonic() - began

    def _listen(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as stream:
            for line in stream:
                self._lines.put(line)
        self._lines.put("")


class Programs:
    """Starts programs that are traced on the simulated device, and finds the relays that they start.

    Args:
        folder: Where the programs and their log lie. Its `run` folder holds the relay's socket.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run_folder = folder / "run"
        self.run_folder.mkdir()
        self.temporary_folder = folder / "tmp"
        self.temporary_folder.mkdir()
        self.log_path = folder / "log"
        self.environment = {
            "PYTHONPATH": str(REPOSITORY),
            "XDG_RUNTIME_DIR": str(self.run_folder),
            "TMPDIR": str(self.temporary_folder),
            "OTEL_NPU_ENABLED": "1",
            "OTEL_NPU_DEVICE": "simulated",
            "OTEL_NPU_STEPS_PER_SECOND": "all",
        }
        self.worker = folder / "worker.py"
        self.worker.write_text(WORKER)
        self._running: list[Program] = []

    def __enter__(self) -> Programs:
        return self

    def __exit__(self, *_: object) -> None:
        for program in self._running:
            if program.process.poll() is None:
                program.process.kill()
                program.process.wait()
            if program.process.stdin is not None and not program.process.stdin.closed:
                program.process.stdin.close()
        if MEASURED:
            self._let_relays_end()
        for pid in self.relays():
            for number in (signal.SIGKILL, signal.SIGCONT):
                _signal(pid, number)
        eventually(lambda: not self.relays(), "the relays are gone")

    def _let_relays_end(self) -> None:
        """By themselves: what a process that is killed has run is not known to be tested."""
        with contextlib.suppress(AssertionError):
            eventually(lambda: not self.relays(), "the relays have ended", DRAIN_SECONDS + 2)

    def start(
        self,
        environment: Mapping[str, str] | None = None,
        *,
        command: list[str] | None = None,
        cwd: Path | None = None,
    ) -> Program:
        """Start a program, by default a worker; what it and its relay write to stderr goes to the log."""
        with self.log_path.open("ab") as log:
            process = subprocess.Popen(
                command or [sys.executable, str(self.worker)],
                env={**os.environ, **self.environment, **(environment or {})},
                cwd=cwd,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        program = Program(process, self.log_path)
        self._running.append(program)
        return program

    @property
    def log(self) -> str:
        """What the programs and their relays have logged, but for the line that says that tracing is on."""
        lines = self.log_path.read_text().splitlines(keepends=True)
        return "".join(line for line in lines if " otel-npu is on: " not in line)

    @property
    def sockets(self) -> list[Path]:
        return list(self.run_folder.glob("otel-npu-*/*.sock"))

    def relays(self) -> list[int]:
        """The relays of these programs that live."""
        return relays(self.run_folder)

    def relay(self) -> int:
        """The relay of these programs, which is to be the only one."""
        [pid] = eventually(self.relays, "a relay runs")
        return int(pid)


def relays(run_folder: Path) -> list[int]:
    """The relays that live and whose socket should be in this folder."""
    return [pid for pid in processes() if _is_relay(pid, run_folder)]


def processes() -> Iterator[int]:
    """The processes of this machine."""
    return (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal())


def _is_relay(pid: int, run_folder: Path) -> bool:
    try:
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if arguments[1:3] != [b"-m", b"otel_npu.relay"] or b"--listener" not in arguments:
            return False
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False  # it has gone
    return b"XDG_RUNTIME_DIR=" + os.fsencode(run_folder) in environment


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
