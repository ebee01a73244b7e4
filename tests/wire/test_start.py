"""What runs the relay, and where it finds its modules."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from otel_npu.wire import start

ROOT = str(Path(start.__file__).parents[2])
NAME = f"python{sys.version_info.major}.{sys.version_info.minor}"


def place(path: Path) -> str:
    """A program of this name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """As if Python were installed in an empty folder."""
    monkeypatch.setattr(sys, "exec_prefix", str(tmp_path))
    monkeypatch.setattr(sys, "base_exec_prefix", str(tmp_path))
    return tmp_path


def test_the_interpreter_is_the_one_that_runs_the_program() -> None:
    assert start.interpreter() == sys.executable


@pytest.mark.parametrize("name", ["python", "python3", "python3.12", "python3.13t", "pypy3"])
def test_an_interpreter_is_told_by_its_name(nowhere: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(sys, "executable", place(nowhere / "elsewhere" / name))
    assert start.interpreter() == sys.executable


@pytest.mark.parametrize("name", ["uwsgi", "server", "python-server", "python3.11-config", ""])
def test_what_is_none_is_never_run(nowhere: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(sys, "executable", place(nowhere / "elsewhere" / name) if name else "")
    with pytest.raises(start.NoInterpreterError, match="is not there"):
        start.interpreter()
    beside = place(nowhere / "bin" / NAME)
    assert start.interpreter() == beside


def test_a_frozen_program_is_no_interpreter_whatever_its_name(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", place(nowhere / "python"))
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    with pytest.raises(start.NoInterpreterError):
        start.interpreter()


def test_an_interpreter_that_is_not_there_is_none(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(nowhere / "python"))
    with pytest.raises(start.NoInterpreterError):
        start.interpreter()


def test_the_relay_finds_what_the_program_finds_but_the_programs_own_modules_last() -> None:
    path = ["/app", "/vendored", "", "relative", "/site", "/vendored", types, "/a:b", ROOT]
    found = start.module_path(path, "/srv", "/app/main.py")
    assert found == ["/vendored", "/srv/relative", "/site", ROOT, "/app", "/srv"]


def test_the_package_itself_is_found_although_the_program_does_not_find_it() -> None:
    assert start.module_path(["/site"], "/srv", None) == ["/site", ROOT]


def test_a_working_directory_that_has_been_removed_is_left_out() -> None:
    assert start.module_path(["", "relative", "/site"], "", None) == ["/site", ROOT]


def test_where_it_is_started_does_not_change_where_the_thread_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.sched_getaffinity(0)
    for mask in ("1", f"{1 << 5000:x}", "none"):
        monkeypatch.setenv(start.CPU_MASK, mask)
        with start._where_the_session_began():
            pass
        assert os.sched_getaffinity(0) == before


def test_what_started_a_relay_that_nobody_waits_for_is_let_go_of_once_it_has_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not while it runs, which Python warns of; nor never, for it would stay a zombie."""
    monkeypatch.setattr(start, "_starters", [])
    monkeypatch.setattr(start, "interpreter", lambda: "/bin/true")
    life, relays_end = os.pipe()
    starter = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    start.StartedRelay(life, starter).close()
    assert start._starters == [starter]
    assert starter.stdin is not None
    starter.stdin.close()
    starter.wait()
    os.close(relays_end)
    started = start.start([], None, {})
    started._starter.wait()
    started.close()
    assert starter not in start._starters
