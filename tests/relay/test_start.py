"""The relay's start: early, once, with what is an interpreter; and what is left of it when the program has ended."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.helpers.traced import Programs, eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.helpers.receiver import Receiver, Span


@pytest.fixture
def programs(tmp_path: Path) -> Iterator[Programs]:
    with Programs(tmp_path) as running:
        yield running


def step_numbers(spans: list[Span]) -> list[int]:
    return sorted(span.attributes["npu.step.number"] for span in spans if span.name == "worker_step")


def test_a_process_is_connected_as_soon_as_it_turns_tracing_on(programs: Programs) -> None:
    worker = programs.start({"OTEL_TRACES_EXPORTER": "none"})
    # The idle thread gets no turn in between.
    assert worker.ask("(sys.setswitchinterval(100), otel_npu.enable(), recorder().channel.connected)")[2] is True


def test_what_a_worker_sends_while_its_relay_starts_arrives_although_it_is_killed(
    programs: Programs, receiver: Receiver
) -> None:
    """On a host whose processors all spin the relay may need seconds for its start."""
    worker = programs.start(receiver.grpc_environment)
    assert worker.ask("otel_npu.enable()") is True
    [relay] = eventually(programs.relays, "the relay's process is there")
    os.kill(relay, signal.SIGSTOP)
    worker.ask("steps(100)")
    eventually(lambda: worker.ask("recorder()._resolved_and_sent()"), "all is in the relay's socket")
    worker.process.kill()
    worker.process.wait()
    for pid in programs.relays():  # it may have become another process, nobody's child
        os.kill(pid, signal.SIGCONT)
    receiver.wait_for(100, "worker_step")
    assert step_numbers(receiver.spans) == list(range(1, 101))


SERVER = """
import json, os, sys, time
with open(os.environ["STARTS"], "a") as starts:
    starts.write("started\\n")
sys.frozen, sys.exec_prefix, sys.base_exec_prefix = True, "/bundle", "/bundle"  # as PyInstaller has it
import otel_npu
for _ in range(5):
    with otel_npu.step("decode"), otel_npu.stage("forward"):
        pass
print(json.dumps(otel_npu.flush(20)), flush=True)
"""


def test_a_frozen_program_is_not_started_again_and_exports_by_itself(programs: Programs, receiver: Receiver) -> None:
    path = programs.folder / "server.py"
    path.write_text(SERVER)
    starts = programs.folder / "starts"
    server = programs.start({**receiver.grpc_environment, "STARTS": str(starts)}, command=[sys.executable, str(path)])
    assert server.answer() is True
    assert programs.relays() == []
    server.process.wait()
    assert starts.read_text() == "started\n"
    assert step_numbers(receiver.spans) == [1, 2, 3, 4, 5]
    said = "no relay can be a process of its own here, so spans are exported from this one: sys.executable is"
    assert programs.log.count(said) == 1


def test_a_relay_that_dies_at_its_start_is_said_once_and_tried_ever_later(programs: Programs) -> None:
    broken = programs.folder / "broken"
    broken.mkdir()
    count = programs.folder / "count"
    (broken / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if 'otel_npu.relay' in sys.orig_argv:\n"
        f"    open({str(count)!r}, 'a').write('.')\n"
        "    sys.exit('no memory for you')\n"
    )
    path = os.pathsep.join((str(broken), programs.environment["PYTHONPATH"]))
    worker = programs.start({"OTEL_TRACES_EXPORTER": "none", "PYTHONPATH": path})
    assert worker.ask("steps(1)") == 1
    eventually(lambda: count.exists() and count.stat().st_size == 3, "three have been started")  # after 1 s and 2 s
    assert worker.ask("recorder()._link._retry_seconds") >= 4
    assert worker.ask("steps(1)") == 1
    assert programs.log.count("no relay, so nothing is exported for now: it ended as soon as it was started") == 1


def test_a_program_that_closes_our_descriptors_is_connected_anew(programs: Programs, receiver: Receiver) -> None:
    worker = programs.start(receiver.grpc_environment)
    assert worker.ask("steps(1) and otel_npu.flush(20)") is True
    # And opens others, which get their numbers.
    assert worker.ask("(os.closerange(3, 200), [os.open('/dev/zero', os.O_RDWR) for _ in range(40)])[1]")
    eventually(lambda: worker.ask("steps(1) and otel_npu.flush(20)"), "it is connected again")
    assert worker.ask("all(os.fstat(fd).st_rdev for fd in range(3, 43))") is True  # theirs are left alone
    worker.leave()
    assert step_numbers(receiver.spans)[:2] == [1, 2]
    assert programs.log.count("the program has closed the descriptor of the connection to the relay") == 1
    assert "Traceback" not in programs.log


PRINTS = """
import otel_npu
with otel_npu.step("decode"), otel_npu.stage("forward"):
    pass
print("done")
"""


def test_who_reads_the_programs_output_to_its_end_does_not_wait_for_the_relay(programs: Programs) -> None:
    with socket.socket() as hangs:
        hangs.bind(("127.0.0.1", 0))
        hangs.listen()
        endpoint = f"http://127.0.0.1:{hangs.getsockname()[1]}"
        process = subprocess.Popen(
            [sys.executable, "-c", PRINTS],
            env={**os.environ, **programs.environment, "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        process.wait()
        output, errors = process.communicate()
    # It says this while it has seconds left, and lets go of our pipes then.
    assert output == "done\n"
    assert "2 spans still wait for the endpoint" in errors


def test_what_goes_to_the_console_is_still_written(programs: Programs) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PRINTS],
        env={**os.environ, **programs.environment, "OTEL_TRACES_EXPORTER": "console"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert '"name": "forward"' in done.stdout


LEAVES_OUT = """
import otel_npu
for _ in range(3):
    with otel_npu.step("decode", requests=["no traceparent"]):
        pass
print("done")
"""


@pytest.mark.parametrize("export", ["relay", "inprocess"])
def test_what_was_left_out_is_said_when_the_program_ends(programs: Programs, export: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LEAVES_OUT],
        env={**os.environ, **programs.environment, "OTEL_TRACES_EXPORTER": "none", "OTEL_NPU_EXPORT": export},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == "left out in the last minute: 3 bad_link\n"
