"""For a long time one trouble after another, and at the end nothing is missing and nothing has grown (`make soak`)."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from otel_npu import semconv
from tests.faults.test_hostile_clients import Attacker, mutated
from tests.helpers.receiver import Answer
from tests.helpers.traced import Programs

if TYPE_CHECKING:
    from collections.abc import Iterator

    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    from tests.helpers.receiver import Receiver

pytestmark = pytest.mark.slow

SECONDS = float(os.environ.get("SOAK_SECONDS", "15"))
STEPS = 50  # each with a stage
REFUSED = Answer(code="INVALID_ARGUMENT", status=400)
UNAVAILABLE = Answer(code="UNAVAILABLE", status=503)
MAX_GROWTH_KIB = 96 * 1024


@pytest.fixture
def programs(tmp_path: Path) -> Iterator[Programs]:
    with Programs(tmp_path) as running:
        yield running


class Refusal:
    """Refuses all. Counts what was other processes': hostile ones make spans too, and the relay counts all as one."""

    def __init__(self, ours: set[int]) -> None:
        self._ours = ours
        self.of_others = 0

    def __call__(self, request: ExportTraceServiceRequest) -> Answer:
        for resource in request.resource_spans:
            [pid] = [pair.value.int_value for pair in resource.resource.attributes if pair.key == "process.pid"]
            if pid not in self._ours:
                self.of_others += sum(len(scope.spans) for scope in resource.scope_spans)
        return REFUSED


def resident_kib(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))


def test_one_trouble_after_another_loses_nothing_without_a_word(programs: Programs, receiver: Receiver) -> None:
    rng = random.Random(1)
    workers = [programs.start(receiver.http_environment)]
    assert workers[0].ask("steps(1) and otel_npu.flush(60)") is True
    session = {"OTEL_NPU_SESSION": workers[0].ask("os.environ['OTEL_NPU_SESSION']")}
    workers += [programs.start({**receiver.http_environment, **session}) for _ in range(2)]
    relay = programs.relay()
    processes = [relay, *(worker.pid for worker in workers)]
    for worker in workers:
        worker.ask(f"steps({20 * STEPS}) and otel_npu.flush(60)")
    before_kib = {pid: resident_kib(pid) for pid in processes}
    ours = {worker.pid for worker in workers}
    refusal = Refusal(ours)
    frozen = False
    answers: dict[str, Answer | Refusal] = {"refused": refusal, "unavailable": UNAVAILABLE}

    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        trouble = rng.choice(["none", "refused", "unavailable", "slow", "frozen", "hostile"])
        receiver.answer = answers.get(trouble, Answer())
        receiver.delay_seconds = 0.3 if trouble == "slow" else 0.0
        if trouble == "frozen":
            os.kill(relay, signal.SIGSTOP)
            frozen = True
        if trouble == "hostile":
            with Attacker(programs) as attacker:
                attacker.send(mutated(300))
        for worker in workers:
            assert worker.ask(f"steps({STEPS})") == STEPS
        time.sleep(rng.random() * 0.2)
        if frozen:
            os.kill(relay, signal.SIGCONT)
            frozen = False

    receiver.answer, receiver.delay_seconds = Answer(), 0.0
    made = 0
    for worker in workers:
        for _ in range(3):  # what was lost meanwhile is told by the first, its count by the second
            worker.ask("steps(1) and otel_npu.flush(120)")
        made += 2 * worker.ask("next(recorder().step_numbers) - 1")
    arrived = [span for span in receiver.spans if span.resource["process.pid"] in ours]
    ids = {span.span_id for span in arrived}
    assert len(ids) == len(arrived)
    reasons = [term.name for term in semconv.DROP_REASONS if term.unit == "{span}"]
    counted = sum(span.attributes.get(f"npu.dropped.{reason}", 0) for reason in reasons for span in receiver.spans)
    assert len(ids) + counted == made + refusal.of_others
    assert programs.relay() == relay
    for pid, kib in before_kib.items():
        assert resident_kib(pid) - kib < MAX_GROWTH_KIB
