"""`otel-npu top`, beside a program that runs."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from otel_npu.cli.top import Top
from otel_npu.looking.session import connect
from tests.helpers.command_line import COMMAND, otel_npu_command
from tests.helpers.traced import PATIENCE_SECONDS, Programs, relays

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HERE = {"OTEL_NPU_SESSION": "here", "OTEL_TRACES_EXPORTER": "none"}
FOR_LONG = "[(steps(1), time.sleep(0.01)) for _ in range(100_000)]"


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A program that steps, in a session of its own."""
    with Programs(tmp_path) as running:
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(running.run_folder))
        worker = running.start(HERE)
        worker.ask("steps(1)")
        worker.tell(FOR_LONG)
        yield "here"


def test_once_as_json_has_the_steps_that_there_were(session: str) -> None:
    before = time.time()
    done = otel_npu_command("top", "--session", session, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["steps"]["decode"] > 0
    assert before < found["until"] - found["seconds"] < found["until"] < time.time()
    assert {row["name"] for row in found["stages"]} == {"forward"}


def shown_until(session: str, done: Callable[[int], object]) -> tuple[int, str]:
    """The exit code of `top` on a terminal, and what it shows; `done` is called once it shows stages."""
    process, terminal = pty.fork()
    if not process:
        os.execve(COMMAND, [COMMAND, "top", "--session", session], {**os.environ, "TERM": "xterm", "COLUMNS": "100"})
    shown, is_done, deadline = b"", False, time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        if not select.select([terminal], [], [], 1.0)[0]:
            continue
        try:
            shown += os.read(terminal, 1 << 16)
        except OSError:
            break
        if b"forward" in shown and not is_done:
            done(terminal)
            is_done = True
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), shown.decode()


def test_on_a_terminal_it_goes_on_until_q(session: str) -> None:
    code, shown = shown_until(session, lambda terminal: os.write(terminal, b"sfrq"))
    assert code == 0
    assert "steps/s" in shown


def test_a_relay_that_is_killed_meanwhile_is_one_line_on_a_terminal_as_it_was(session: str) -> None:
    def kill(_: int) -> None:
        (relay,) = relays(Path(os.environ["XDG_RUNTIME_DIR"]))
        os.kill(relay, signal.SIGKILL)

    code, shown = shown_until(session, kill)
    assert code == 1
    left_the_screen = "\x1b[?1049l"
    after = shown.rpartition(left_the_screen)[2]
    assert after.count("otel-npu: ") == 1
    assert "session here has ended, or its relay was killed: nobody is there any more" in after
    assert "Traceback" not in shown


def test_keys_sort_choose_a_rank_and_freeze(session: str) -> None:
    with connect(session=session) as connection:
        top = Top(connection)
        top.press("s", [])
        top.press("r", [0, 1])
        top.press("r", [0, 1])
        top.press("f", [])
        top.press("x", [])
        assert (top.sort, top.rank, top.frozen, top.done) == ("p50_ms", 1, True, False)
        top.press("r", [0, 1])
        assert top.rank is None
        top.press("q", [])
        assert top.done
