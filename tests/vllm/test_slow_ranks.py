"""Which rank was late and how long a device was idle, on two simulated NPUs behind the real torch_npu, as spans."""

from __future__ import annotations

import time
import types
from typing import TYPE_CHECKING, Any

import pytest

import otel_npu
from otel_npu import semconv
from otel_npu.capture import switch
from otel_npu.vllm import engine, worker
from tests.helpers.capturing import MILLISECOND, chosen
from tests.helpers.vllm_spans import Spans

if TYPE_CHECKING:
    from tests.helpers.ascend.simulator import Simulator
    from tests.helpers.receiver import Receiver, Span

STEPS = 20
FORWARD_NS = 2 * MILLISECOND
EVENTS_A_STEP = 4
FORWARD_BEGINS = 2  # of them, the third


def parallel(ranks: int) -> Any:
    config = types.SimpleNamespace(tensor_parallel_size=ranks, world_size=ranks, data_parallel_rank=0)
    return types.SimpleNamespace(parallel_config=config)


class Scheduler:
    """Has one request, and nobody traces it."""

    def __init__(self) -> None:
        self.requests: dict[str, Any] = {}

    def add_request(self, request: Any) -> None:
        """Not called."""

    def schedule(self) -> Any:
        return types.SimpleNamespace(
            num_scheduled_tokens={"a": 1},
            total_num_scheduled_tokens=1,
            finished_req_ids=set(),
            scheduled_new_reqs=[],
            scheduled_spec_decode_tokens={},
        )

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> dict[int, Any]:
        return {}


class Worker:
    """A rank with a device of its own; so long is what it does before its forward."""

    def __init__(self, rank: int, prepare_ns: int, torch: Any, ranks: int = 2) -> None:
        self.rank, self.prepare_ns, self.torch = rank, prepare_ns, torch
        self.vllm_config = parallel(ranks)
        self.model_runner = types.SimpleNamespace()

    @worker.around_execute_model
    def execute_model(self, _scheduler_output: Any) -> str:
        with worker.scope("prepare input"):
            self.torch.npu._sleep(self.prepare_ns)
        with worker.scope("forward"):
            self.torch.npu._sleep(FORWARD_NS)
        return "output"


@pytest.fixture
def sent(torch_npu: Any, receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> Receiver:
    """Tracing is on, and this is where the spans go."""
    from otel_npu.devices.npu import Npu

    for variable, value in receiver.grpc_environment.items():
        monkeypatch.setenv(variable, value)
    switch.enable_on(Npu.open(), chosen())
    return receiver


def run_two_ranks(ascend: Simulator, torch: Any, late_ns: int) -> list[int]:
    """Steps of two ranks, of which the second is so late; by how much it really started its forward later."""
    scheduler: Any = Scheduler()
    engine.EngineSteps(scheduler, parallel(2))
    workers = [Worker(rank, MILLISECOND + rank * late_ns, torch) for rank in (0, 1)]
    ascend.set_clock(1, 7_000_000, 40)  # the two devices' clocks have nothing to do with each other
    ascend.truth_start(1000)
    for _ in range(STEPS):
        output = scheduler.schedule()
        held = []
        for each in workers:  # so that both begin together, whatever this machine does meanwhile
            with torch.npu.device(each.rank):
                held.append(ascend.hold(torch.npu.current_stream().npu_stream))
                each.execute_model(output)
                torch.npu.current_stream().npu_stream  # noqa: B018  waits until all has been dispatched
        for handle in held:
            ascend.release(handle)
        for each in workers:
            torch.npu.synchronize(each.rank)
        scheduler.update_from_output(output, None)
    ascend.truth_stop()
    forwards = []
    for each in workers:
        records = [record for record in ascend.truth() if record.device == each.rank]
        on_its_stream = [record.host_ns for record in records if record.stream_id == records[0].stream_id]
        forwards.append(on_its_stream[FORWARD_BEGINS::EVENTS_A_STEP])
    assert otel_npu.flush(20)
    return [second - first for first, second in zip(*forwards, strict=True)]


def steps_and_uncertainties(receiver: Receiver) -> list[tuple[Span, float]]:
    """The engine's steps in order, each with what the clocks of its two forwards leave open, in s."""
    spans = Spans(receiver.spans)
    found = []
    for step in sorted(spans.named(semconv.ENGINE_STEP), key=lambda step: step.start_ns):
        forwards = [span for span in spans.descendants(step) if span.name == "forward"]
        assert len(forwards) == 2
        found.append((step, sum(span.attributes[semconv.CLOCK_UNCERTAINTY] for span in forwards)))
    assert len(found) == STEPS
    return found


def test_the_rank_that_starts_5_ms_late_is_named_with_as_much(
    ascend: Simulator, torch_npu: Any, sent: Receiver
) -> None:
    late_ns = run_two_ranks(ascend, torch_npu, 5 * MILLISECOND)
    named = 0
    for (step, uncertainty), true_ns in zip(steps_and_uncertainties(sent), late_ns, strict=True):
        if semconv.STEP_SKEW not in step.attributes:
            assert true_ns * 1e-9 <= 2 * uncertainty  # a very busy machine: its looks at the clocks took too long
            continue
        assert step.attributes[semconv.STEP_STRAGGLER] == 1
        # About 5 ms: on a busy machine the rank that is to be late may wait for less, or for more.
        assert step.attributes[semconv.STEP_SKEW] == pytest.approx(true_ns * 1e-9, abs=uncertainty + 3e-6)
        named += 1
    assert named  # and of the others it is known why they are not


def test_of_ranks_that_start_together_nobody_is_named(ascend: Simulator, torch_npu: Any, sent: Receiver) -> None:
    together_ns = run_two_ranks(ascend, torch_npu, 0)
    named = []
    for (step, uncertainty), true_ns in zip(steps_and_uncertainties(sent), together_ns, strict=True):
        if semconv.STEP_STRAGGLER in step.attributes:  # the machine stopped between letting one device go and the other
            named.append(step)
            assert step.attributes[semconv.STEP_SKEW] > uncertainty
            assert step.attributes[semconv.STEP_SKEW] == pytest.approx(abs(true_ns) * 1e-9, abs=uncertainty + 3e-6)
    assert len(named) < STEPS / 2


def test_a_device_that_was_idle_for_2_ms_between_steps_says_so_to_20_us(
    ascend: Simulator, torch_npu: Any, sent: Receiver
) -> None:
    ascend.manual_clock(True)
    scheduler: Any = Scheduler()
    engine.EngineSteps(scheduler, parallel(1))
    only = Worker(0, MILLISECOND, torch_npu, ranks=1)
    for _ in range(5):
        output = scheduler.schedule()
        only.execute_model(output)
        torch_npu.npu.current_stream().npu_stream  # noqa: B018  waits until all has been dispatched
        ascend.advance(3000)  # what the step takes
        ascend.advance(2000)
        time.sleep(0.006)  # a device that has been idle for longer than the host has lived since is not believed
        scheduler.update_from_output(output, None)
    assert otel_npu.flush(20)
    ascend.manual_clock(False)
    spans = Spans(sent.spans)
    for name in (semconv.ENGINE_STEP, semconv.WORKER_STEP):
        steps = sorted(spans.named(name), key=lambda step: step.attributes[semconv.STEP_NUMBER])
        idle = [step.attributes.get(semconv.STEP_IDLE) for step in steps]
        assert idle == [None, *[pytest.approx(2e-3, abs=20e-6)] * 4]
