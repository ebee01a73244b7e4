"""Each call that we make of the device fails, once and always, with each kind of error: the model does not notice.

An error out of recording an event is the exception: torch_npu hands a failed launch of the model's to whoever enqueues
next, so it can't be told from one of the model's own, and goes on to the model.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from tests.faults.effort import IN_FULL

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.helpers.receiver import Receiver

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("loaded_ascend")]

# Of each kind that CANN documents: parameters, resources, the driver, the device; and some that it does not.
CODES = (100000, 107002, 107003, 207000, 207001, 207018, 507000, 507014, 507015, 507018, 507035, 507899, 1, -1)
SOME = (107003, 207001, 507015)
STEPS, STAGES = 4, 3

# The model: kernels in stages in steps. Says what went wrong in it, and how many of its kernels were launched.
PROGRAM = """
import json
from tests.helpers.ascend.simulator import Simulator
simulator = Simulator.load()
import torch, torch_npu
import otel_npu
from otel_npu.capture import switch

torch.npu.set_device(0)
torch.npu._sleep(1)
launched = simulator.count("launch")
wrong = []

def model(steps):
    for _ in range(steps):
        with otel_npu.step("decode"):
            for name in ("prepare_input", "forward", "sample"):
                with otel_npu.stage(name):
                    torch.npu._sleep(1000)
        torch.npu.synchronize()
    otel_npu.flush({patience})

def attempt(steps, *fault):
    if fault:
        simulator.fail(*fault)
    try:
        model(steps)
    except BaseException as error:
        wrong.append([*fault, repr(error)[:200]])
    simulator.defaults()

if {warm_up}:
    model(2)
for fault in {faults}:
    attempt({steps}, *fault)
attempt(2)
attempt(1)
print(json.dumps([wrong, simulator.count("launch") - launched, switch.current_recorder() is not None]), flush=True)
"""


def run(
    run_program: Callable[..., Any],
    receiver: Receiver,
    queue: str,
    faults: list[tuple[str, int, int]],
    *,
    warm_up: bool,
    patience: int = 60,
) -> tuple[list[Any], int, bool, str]:
    """What went wrong in the model, how many of its kernels were launched, whether tracing is on, and the log."""
    done = run_program(
        PROGRAM.format(steps=STEPS, faults=faults, warm_up=warm_up, patience=patience),
        {
            **receiver.grpc_environment,
            "OTEL_NPU_ENABLED": "1",
            "OTEL_NPU_STEPS_PER_SECOND": "all",
            "OTEL_NPU_HANG_SECONDS": str(patience / 4),
            "TASK_QUEUE_ENABLE": queue,
            "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        },
    )
    wrong, launched, on = json.loads(done.stdout.splitlines()[-1])
    return wrong, launched, on, done.stderr


@pytest.mark.parametrize("queue", ["0", "1"])
@pytest.mark.parametrize("call", ["query", "timestamp", "elapsed"])
def test_reading_that_fails_costs_times_and_nothing_else(
    run_program: Callable[..., Any], receiver: Receiver, call: str, queue: str
) -> None:
    codes = CODES if IN_FULL else SOME
    faults = [(call, code, times) for code in codes for times in (1, 1_000_000)]
    wrong, launched, on, _ = run(run_program, receiver, queue, faults, warm_up=True)
    steps = 2 + len(faults) * STEPS + 3
    assert (wrong, launched, on) == ([], steps * STAGES, True)
    assert len(receiver.named("worker_step")) == steps
    # A code that means "not yet", and lasts, is a hang, and told as that.
    stages = [span for span in receiver.spans if span.name not in ("worker_step", "unfinished_stage")]
    assert len(stages) == steps * STAGES
    timings = [span.attributes["npu.timing"] for span in stages]
    assert set(timings) == {"device", "host"}
    assert timings[-STAGES:] == ["device"] * STAGES
    counted = sum(span.attributes.get("npu.dropped.times_unreadable", 0) for span in receiver.spans)
    assert counted == timings.count("host")


@pytest.mark.parametrize("queue", ["0", "1"])
@pytest.mark.parametrize("times", [1, 1_000_000])
def test_an_event_that_cannot_be_made_is_ours_alone(
    run_program: Callable[..., Any], receiver: Receiver, times: int, queue: str
) -> None:
    """The first ones of the process. The host times what has no event."""
    for code in CODES if IN_FULL else (107003, 207000):
        before = len(receiver.spans)
        wrong, launched, on, _ = run(run_program, receiver, queue, [("create", code, times)], warm_up=False)
        assert (wrong, launched, on) == ([], (STEPS + 3) * STAGES, True), code
        spans = receiver.spans[before:]
        missing = (STEPS + 3) * (STAGES + 1) - len(spans)
        assert 0 <= missing <= 1  # the stage that found it out
        counted = sum(span.attributes.get("npu.dropped.pool_exhausted", 0) for span in spans)
        assert counted == missing + sum(span.name.endswith("(host)") for span in spans)


@pytest.mark.parametrize("queue", ["0", "1"])
def test_a_record_that_fails_is_the_models_and_tracing_ends_audibly(
    run_program: Callable[..., Any], receiver: Receiver, queue: str
) -> None:
    """With the task queue it may be the model's own launch that is handed the error, and we never hear of it.

    Then torch_npu runs nothing more of the model's either, and what can never finish is said to hang.
    """
    wrong, launched, on, log = run(run_program, receiver, queue, [("record", 507015, 1)], warm_up=True, patience=4)
    assert wrong
    if on:
        assert queue == "1"
        assert launched < (2 + STEPS + 3) * STAGES
    assert ("has been unfinished for" if on else "tracing is off from here") in log
    assert len(receiver.named("worker_step")) >= 2


CAPTURING = """
import json
from tests.helpers.ascend.simulator import Simulator
simulator = Simulator.load()
import torch, torch_npu
import otel_npu

torch.npu.set_device(0)
torch.npu._sleep(1)
graph, side = torch.npu.NPUGraph(), torch.npu.Stream()

def stage(name):
    with otel_npu.stage(name):
        torch.npu._sleep(1_000_000)

def replay():
    # what it takes the device, in microseconds
    simulator.manual_clock(True)
    start, end = (torch.npu.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    torch.npu.synchronize()
    simulator.manual_clock(False)
    return round(start.elapsed_time(end) * 1000)

with otel_npu.step("prefill"):
    stage("before")
torch.npu.synchronize()
with otel_npu.step("capture"):
    with otel_npu.stage("around"):
        with torch.npu.graph(graph):
            stage("inside")
            torch.npu._sleep(1_000_000)
    replayed = [replay()]
with otel_npu.step("begins inside"):
    with torch.npu.stream(side):
        with otel_npu.stage("ends inside"):  # its end becomes a part of the graph
            graph = torch.npu.NPUGraph()
            graph.capture_begin()
            torch.npu._sleep(1_000_000)
        graph.capture_end()
    replayed.append(replay())
with otel_npu.step("decode"):
    stage("after")
torch.npu.synchronize()
for _ in range(2):
    assert otel_npu.flush(60)
    with otel_npu.step("last"):
        pass
assert otel_npu.flush(60)
print(json.dumps(replayed), flush=True)
"""


@pytest.mark.parametrize("queue", ["0", "1"])
def test_a_graph_that_is_captured_in_the_midst_of_a_stage_is_the_same_as_without_us(
    run_program: Callable[..., Any], receiver: Receiver, queue: str
) -> None:
    done = run_program(
        CAPTURING,
        {
            **receiver.grpc_environment,
            "OTEL_NPU_ENABLED": "1",
            "OTEL_NPU_STEPS_PER_SECOND": "all",
            "TASK_QUEUE_ENABLE": queue,
            "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        },
    )
    assert json.loads(done.stdout.splitlines()[-1]) == [2000, 1000]
    assert "Traceback" not in done.stderr
    timed = {
        span.name.removesuffix(" (host)"): span.attributes["npu.timing"]
        for span in receiver.spans
        if span.name != "worker_step"
    }
    assert timed == {"before": "device", "around": "device", "ends inside": "host", "after": "device"}
    counted = Counter[str]()
    for span in receiver.spans:
        counted.update({key: value for key, value in span.attributes.items() if key.startswith("npu.dropped.")})
    assert counted == {"npu.dropped.stream_captured": 1, "npu.dropped.times_unreadable": 1}
