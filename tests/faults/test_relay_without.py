"""A relay that runs out of descriptors, of memory or of disk, and one whose receiver says all there is to say."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest

from otel_npu import semconv
from tests.faults.effort import IN_FULL
from tests.helpers.receiver import Answer
from tests.helpers.traced import Programs, eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.helpers.receiver import Receiver, Span

pytestmark = pytest.mark.slow


@pytest.fixture
def programs(tmp_path: Path) -> Iterator[Programs]:
    with Programs(tmp_path) as running:
        yield running


@contextlib.contextmanager
def limited(pid: int, what: int, limit: int) -> Iterator[None]:
    """A process that may not have more of something."""
    soft, hard = resource.prlimit(pid, what)
    resource.prlimit(pid, what, (limit, hard))
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(pid, what, (soft, hard))


def lost(spans: list[Span]) -> int:
    reasons = (term.name for term in semconv.DROP_REASONS if term.unit == "{span}")
    return sum(span.attributes.get(f"npu.dropped.{reason}", 0) for reason in reasons for span in spans)


def test_without_descriptors_it_serves_whom_it_has_and_later_the_others(programs: Programs, receiver: Receiver) -> None:
    worker = programs.start(receiver.grpc_environment)
    assert worker.ask("steps(1) and otel_npu.flush(60)") is True
    with limited(programs.relay(), resource.RLIMIT_NOFILE, 8):
        other = programs.start({**receiver.grpc_environment, "OTEL_NPU_SESSION": worker.ask(SESSION)})
        other.ask("steps(5)")
        for _ in range(5):
            worker.ask("steps(20) and otel_npu.flush(1)")
    relay = programs.relay()
    assert eventually(lambda: worker.ask("steps(1) and otel_npu.flush(60)"), "it is served")
    assert eventually(lambda: other.ask("steps(1) and otel_npu.flush(60)"), "the other is, too")
    assert programs.relay() == relay
    mine = [span for span in receiver.named("worker_step") if span.resource["process.pid"] == worker.pid]
    assert len(mine) == worker.ask("next(recorder().step_numbers) - 1")


SESSION = "os.environ['OTEL_NPU_SESSION']"


def test_without_memory_the_program_runs_on_and_is_traced_again(programs: Programs, receiver: Receiver) -> None:
    worker = programs.start(receiver.grpc_environment)
    assert worker.ask("steps(1) and otel_npu.flush(60)") is True
    with limited(programs.relay(), resource.RLIMIT_AS, 1 << 20):
        assert worker.ask("large_steps(300)") == 300
        assert worker.ask("otel_npu.flush(1)") in {True, False}
    assert eventually(lambda: worker.ask("steps(1) and otel_npu.flush(60)"), "spans arrive again")
    last = receiver.named("worker_step")[-1]
    assert last.attributes["npu.step.number"] >= 302
    assert worker.leave() < 60


FLUSHED = """
import sys, otel_npu
for _ in range(10):
    with otel_npu.step("decode"):
        pass
open(sys.argv[1], "w").write(str(otel_npu.flush(30)))
"""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_output_on_a_full_disk_costs_its_spans_and_they_are_counted(programs: Programs, tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full, programs.log_path.open("ab") as log:
        subprocess.run(
            [sys.executable, "-c", FLUSHED, str(tmp_path / "flushed")],
            env={**os.environ, **programs.environment, "OTEL_TRACES_EXPORTER": "console"},
            stdout=full,
            stderr=log,
            check=True,
        )
    eventually(lambda: not programs.relays(), "the relay has ended")
    assert (tmp_path / "flushed").read_text() == "False"
    assert "10 export_failed" in programs.log


@pytest.fixture
def mute_tls() -> Iterator[int]:
    """A port that takes connections and never says a word, as a TLS server that hangs."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = []

        def take() -> None:
            with contextlib.suppress(OSError):
                while True:
                    taken.append(server.accept()[0])

        threading.Thread(target=take, daemon=True).start()
        yield server.getsockname()[1]
        for connection in taken:
            connection.close()


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_a_receiver_that_stalls_in_its_tls_handshake(programs: Programs, mute_tls: int, protocol: str) -> None:
    worker = programs.start(
        {"OTEL_EXPORTER_OTLP_ENDPOINT": f"https://127.0.0.1:{mute_tls}", "OTEL_EXPORTER_OTLP_PROTOCOL": protocol}
    )
    worker.ask("steps(200)")
    assert worker.ask("otel_npu.flush(1)") is False
    assert eventually(lambda: worker.ask("all_is_read()") is True, "the relay has read all")
    other = programs.start({"OTEL_NPU_ENABLED": "0"})
    other.ask("1")
    assert worker.leave() < 2 + 10 * other.leave() + 3
    eventually(lambda: not programs.relays(), "the relay has ended")


GRPC = [code.name for code in grpc.StatusCode if code is not grpc.StatusCode.OK]
HTTP = [400, 401, 403, 404, 408, 409, 413, 418, 429, 500, 501, 502, 503, 504]
CASES = [*(("grpc", code) for code in GRPC), *(("http", code) for code in HTTP)]
SOME = [*(("grpc", code) for code in GRPC[:3]), ("http", 400), ("http", 503)]


@pytest.mark.parametrize(("protocol", "code"), CASES if IN_FULL else SOME, ids=str)
def test_each_error_of_a_receiver_that_then_recovers(
    programs: Programs, receiver: Receiver, protocol: str, code: str | int
) -> None:
    """Whatever it says, each span arrives once, or is counted once."""
    receiver.answer = Answer(code="UNKNOWN", status=code) if isinstance(code, int) else Answer(code=code)
    worker = programs.start(receiver.grpc_environment if protocol == "grpc" else receiver.http_environment)
    worker.ask("steps(50)")
    worker.ask("otel_npu.flush(2)")
    assert not receiver.spans
    receiver.answer = Answer()
    steps = 50

    def all_accounted_for() -> bool:
        nonlocal steps
        steps += worker.ask("steps(1)")
        worker.ask("otel_npu.flush(60)")
        return bool(len(receiver.spans) + lost(receiver.spans) == 2 * steps)

    eventually(all_accounted_for, "each span has arrived or is counted")
    ids = {span.span_id for span in receiver.spans}
    assert len(ids) == len(receiver.spans)
