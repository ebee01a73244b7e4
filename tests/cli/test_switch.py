"""`otel-npu status`, `off` and `on`, beside a program that runs; and who may look at what."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from otel_npu.looking import session
from otel_npu.looking.session import LookError, connect
from otel_npu.wire import frames, rendezvous
from tests.faults.effort import times
from tests.helpers.built import hello
from tests.helpers.command_line import otel_npu_command
from tests.helpers.traced import Programs, eventually
from tests.relay.test_server import Relay

if TYPE_CHECKING:
    import socket
    import subprocess
    from collections.abc import Callable, Iterator

    from tests.helpers.receiver import Receiver

HERE = {"OTEL_NPU_SESSION": "here"}


@pytest.fixture
def programs(tmp_path: Path) -> Iterator[Programs]:
    with Programs(tmp_path) as running:
        yield running


def command(programs: Programs, *arguments: str) -> Any:
    return otel_npu_command(*arguments, "--session", "here", environment={"XDG_RUNTIME_DIR": str(programs.run_folder)})


def test_a_program_is_switched_off_and_on_while_it_runs(programs: Programs, receiver: Receiver) -> None:
    worker = programs.start({**receiver.grpc_environment, **HERE, "OTEL_SERVICE_NAME": "llm"})
    worker.ask("steps(3)")
    off = command(programs, "off")
    assert (off.returncode, off.stdout) == (0, "capture is off in session here, in its only process\n")
    receiver.wait_for(3, "worker_step")
    assert worker.ask("steps(5) and type(otel_npu.stage('forward')).__name__") == "OffStage"
    (process,) = json.loads(command(programs, "status", "--json").stdout)["processes"]
    assert (process["pid"], process["on"], process["service"]) == (worker.pid, False, "llm")
    assert command(programs, "on").returncode == 0
    worker.ask("steps(2) and otel_npu.flush(60)")
    receiver.wait_for(5, "worker_step")
    assert len([span for span in receiver.spans if span.name == "worker_step"]) == 5
    assert "on " in command(programs, "status").stdout


@pytest.mark.slow
def test_back_and_forth_leaves_nothing_behind_in_the_program_nor_in_the_relay(
    programs: Programs, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(programs.run_folder))
    worker = programs.start({**receiver.grpc_environment, **HERE})
    rounds = times(40, 500)

    def switched(looks: session.Connection, *, on: bool) -> None:
        looks.switch(on=on)
        eventually(lambda: [each.on for each in looks.ask().processes] == [on], f"capture is {'on' if on else 'off'}")

    def back_and_forth(count: int) -> list[tuple[int, int, int]]:
        for _ in range(count):
            worker.ask("steps(2)")
            with connect("here") as looks:
                switched(looks, on=False)
                worker.ask("steps(1)")
                switched(looks, on=True)
        assert worker.ask("otel_npu.flush(60)")
        return [held(worker.pid), held(programs.relay())]

    worker.ask("steps(1) and otel_npu.flush(60)")
    first = back_and_forth(20)
    last = back_and_forth(rounds)
    for (descriptors, threads, memory), (descriptors_now, threads_now, memory_now) in zip(first, last, strict=True):
        assert (descriptors_now, threads_now) == (descriptors, threads)
        assert memory_now - memory < 4 << 20, (memory, memory_now)
    receiver.wait_for(1 + 2 * (20 + rounds), "worker_step")
    assert len([span for span in receiver.spans if span.name == "worker_step"]) == 1 + 2 * (20 + rounds)


def held(pid: int) -> tuple[int, int, int]:
    """The descriptors, threads and bytes of memory that a process has."""
    folder = Path("/proc", str(pid))
    status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
    return len(list((folder / "fd").iterdir())), int(status["Threads"]), int(status["VmRSS"].split()[0]) << 10


def test_a_process_that_does_not_answer_in_time_is_named(programs: Programs) -> None:
    worker = programs.start({**HERE, "OTEL_TRACES_EXPORTER": "none"})
    worker.ask("steps(1) and otel_npu.flush(60)")
    os.kill(worker.pid, signal.SIGSTOP)
    try:
        off = command(programs, "off")
    finally:
        os.kill(worker.pid, signal.SIGCONT)
    assert off.returncode == 1
    assert off.stderr == f"otel-npu: capture is not off everywhere: no answer within 3 s from {worker.pid}\n"
    assert command(programs, "off").returncode == 0  # it has heard of it, once it can


@pytest.mark.parametrize("word", ["off", "on"])
def test_off_and_on_are_quick_for_they_import_only_what_they_need(
    word: str, run_program: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    done = run_program(f"""
        import sys

        sys.argv = ["otel-npu", {word!r}, "--session", "nowhere"]
        from otel_npu.cli import main

        try:
            main()
        except SystemExit as end:
            assert end.code == 1
        unwanted = {{"typer", "rich", "importlib.metadata", "opentelemetry", "google", "grpc", "requests", "torch"}}
        assert not unwanted & set(sys.modules), unwanted & set(sys.modules)
    """)
    assert done.stderr.startswith("otel-npu: there is no session 'nowhere'")


def test_off_complains_of_what_it_does_not_take_as_every_command_does() -> None:
    done = otel_npu_command("off", "--pid", "x")
    assert (done.returncode, done.stdout) == (2, "")
    assert "--pid" in done.stderr
    assert "Stop capture" in otel_npu_command("off", "--help").stdout


def test_a_session_that_is_not_there_is_one_line() -> None:
    done = otel_npu_command("status", "--session", "nowhere")
    assert done.returncode == 1
    assert done.stderr.startswith(f"otel-npu: there is no session 'nowhere' of user {os.getuid()} on this host")
    assert done.stderr.count("\n") == 1


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No other session of this machine is seen."""
    monkeypatch.setattr(session, "_UNIX_SOCKETS", tmp_path / "none")
    return rendezvous.socket_path("none").parent


@pytest.fixture
def relays(alone: Path) -> Iterator[list[Relay]]:
    """Two sessions, `one` and `two`."""
    running = []
    for number, name in enumerate(("one", "two"), 1):
        relay = Relay()
        relay.server._clients._listeners = {}
        listener = rendezvous.listen(alone / f"{name}.sock")
        listener.setblocking(False)
        relay.server._clients._listeners[listener.fileno()] = listener
        relay.server._clients._listen()
        relay.client().send(hello(pid=number, service_name=f"service-{name}"))
        relay.run()
        running.append(relay)
    yield running
    for relay in running:
        relay.end()


@pytest.mark.usefixtures("alone")
def test_without_a_session_that_is_said() -> None:
    with pytest.raises(LookError, match="no session of user"):
        connect()


@pytest.mark.usefixtures("relays")
def test_of_several_sessions_one_has_to_be_chosen() -> None:
    def error(**chosen: Any) -> str:
        with pytest.raises(LookError) as raised:
            connect(**chosen)
        return str(raised.value)

    eventually(lambda: "service-two with processes 2" in error(), "both have said hello")
    assert "several sessions run here, choose one by --session or --pid: one (service-one with processes 1)" in error()
    with connect(session="two") as chosen:
        assert chosen.session == "two"
    with connect(pid=2) as chosen:
        assert chosen.session == "two"
    assert error(pid=999_999_999) == "no session has a process 999999999; there are one, two"


def test_what_another_user_serves_is_not_looked_at(
    alone: Path, relays: list[Relay], monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = os.getuid() + 1

    def peer(_: socket.socket) -> tuple[int, int]:
        return 1, theirs

    monkeypatch.setattr(rendezvous, "_peer", peer)
    with pytest.raises(
        LookError, match=f"session one is not for user {os.getuid()}: the other end .* is user {theirs}"
    ):
        connect(session="one")


def test_a_relay_that_dies_meanwhile_is_one_line(relays: list[Relay]) -> None:
    with connect(session="one") as looks:
        relays[0].end()
        with pytest.raises(LookError, match="session one has ended, or its relay was killed"):
            looks.ask()


def test_a_relay_of_another_version_is_said(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "_ANSWER_SECONDS", 0.1)
    listener = rendezvous.listen(alone / "old.sock")
    with listener, pytest.raises(LookError, match="does not answer: it is stopped, or of another version"):
        connect(session="old")


def test_what_else_comes_before_the_answer_is_kept(relays: list[Relay]) -> None:
    with connect(session="one") as looks:
        looks.switch(on=True)
        looks.ask(follow=True)
        looks.ask()
        (view,) = looks.views(0.0)
        assert frames.decode_frame(bytes(view.packet)).pid == 1  # type: ignore[union-attr]
