"""From the real torch_npu binding to an OTLP receiver: every stage, once, with what the device executed."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from tests.helpers.collector import Collector

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.helpers.ascend.simulator import Simulator
    from tests.helpers.receiver import Receiver, Span

    RunProgram = Callable[..., subprocess.CompletedProcess[str]]

pytestmark = pytest.mark.slow

STEPS = 2000
STAGES = ("prepare_input", "forward", "post_process", "sample", "draft")

# Each writes what the simulated device executed, from the runtime's own log, to a file.
PROGRAM = """
import json, random, sys, time
from tests.helpers.ascend.simulator import Simulator
simulator = Simulator.load()
import torch, torch_npu
import otel_npu
from otel_npu.capture import switch

STEPS, STAGES, WARM_UP, MODE = {steps}, {stages}, 50, {mode!r}
torch.npu.set_device(0)
torch.npu._sleep(1)
torch.npu.synchronize()
lengths = random.Random(1)

def drained_stream():
    return torch.npu.current_stream().npu_stream  # reading it waits for the host's task queue, not for the device

def step():
    backlog = simulator.hold(drained_stream()) if MODE == "backlog" else None
    with otel_npu.step("decode"):
        for name in STAGES:
            with otel_npu.stage(name):
                if MODE == "launch-bound":
                    torch.npu._sleep(lengths.randrange(1_000, 5_000))
                else:
                    torch.npu._sleep(length(name))
    stream = drained_stream()
    if backlog is not None:
        simulator.release(backlog)
    return stream

executed = []
def length(name):
    longest = 200_000 if MODE == "backlog" else 3_000_000
    executed.append(lengths.choice([20, 1_000, 12_340, 150_020, longest]))
    return executed[-1]

if MODE == "manual clock":
    simulator.manual_clock(True)
for _ in range(WARM_UP):  # with the clock stopped nothing is over: so many events as these steps need are there then
    step()
if MODE == "manual clock":
    simulator.advance(1e6)
assert otel_npu.flush(20)
counts = simulator.counts()
executed.clear()
simulator.truth_start(2 * len(STAGES) * STEPS + 1000)  # and some pings, on a stream of their own
for number in range(STEPS):
    step()
    if MODE == "manual clock":
        simulator.advance(20_000)
    if number % 20 == 0:
        pending = switch.current_recorder().local.thread.pending
        while pending:  # never more at once than the pool has events for
            time.sleep(0.0005)
assert otel_npu.flush(20)
after = simulator.counts()
simulator.truth_stop()
made = {{call: after[call] - counts[call] for call in counts}}
records = simulator.truth()
stream_id = records[0].stream_id
truth = [event.device_ns for event in records if event.stream_id == stream_id]
json.dump({{"made": made, "truth": truth, "executed": executed, "warm_up": WARM_UP}}, open({path!r}, "w"))
"""


def run(run_program: RunProgram, path: Path, mode: str, environment: dict[str, str], steps: int) -> dict[str, Any]:
    run_program(
        PROGRAM.format(steps=steps, stages=STAGES, mode=mode, path=str(path)),
        {
            "OTEL_NPU_ENABLED": "1",
            "OTEL_NPU_STEPS_PER_SECOND": "all",
            "OTEL_BSP_SCHEDULE_DELAY": "100",
            **environment,
        },
        timeout=300,
    )
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def by_step(spans: list[Span], warm_up: int) -> list[list[Span]]:
    """The stage spans of each step after warm-up, in the order of the steps, then of their starts."""
    steps = {span.span_id: span.attributes["npu.step.number"] for span in spans if span.name == "worker_step"}
    stages: dict[int, list[Span]] = {}
    for span in spans:
        if span.name in STAGES:
            stages.setdefault(steps[span.parent_span_id], []).append(span)
    return [
        sorted(stages[number], key=lambda span: (span.start_ns, STAGES.index(span.name)))
        for number in sorted(stages)
        if number > warm_up
    ]


def device_durations(result: dict[str, Any]) -> list[int]:
    """What the device executed of each stage, in nanoseconds: between the records of its two events."""
    times = result["truth"]
    return [end - start for start, end in zip(times[::2], times[1::2], strict=True)]


@pytest.fixture(params=["grpc", "http", "grpc through a collector", "http through a collector"])
def way(request: pytest.FixtureRequest, receiver: Receiver) -> Iterator[dict[str, str]]:
    """The environment that makes spans arrive at the receiver, each way there is."""
    with Collector(receiver) if "collector" in request.param else contextlib.nullcontext(receiver) as first:
        yield first.grpc_environment if "grpc" in request.param else first.http_environment


@pytest.mark.usefixtures("ascend")
def test_every_stage_arrives_once_with_the_duration_that_the_device_executed(
    way: dict[str, str], receiver: Receiver, run_program: RunProgram, tmp_path: Path
) -> None:
    result = run(run_program, tmp_path / "truth.json", "manual clock", way, STEPS)
    stages = STEPS * len(STAGES)
    receiver.wait_for((STEPS + result["warm_up"]) * (len(STAGES) + 1))
    spans = receiver.spans
    assert len({span.span_id for span in spans}) == len(spans)
    assert Counter(span.name for span in spans) == dict.fromkeys((*STAGES, "worker_step"), STEPS + result["warm_up"])

    arrived = [span for step in by_step(spans, result["warm_up"]) for span in step]
    assert [span.name for span in arrived] == list(STAGES) * STEPS
    executed = result["executed"]
    assert device_durations(result) == executed
    assert len(arrived) == len(executed) == stages
    for span, nanoseconds in zip(arrived, executed, strict=True):
        assert span.attributes["npu.timing"] == "device"
        assert abs(span.duration_ns - nanoseconds) <= max(1000, nanoseconds * 1e-6)


@pytest.mark.usefixtures("ascend")
def test_capturing_synchronises_nothing_and_makes_no_event_after_warm_up(
    receiver: Receiver, run_program: RunProgram, tmp_path: Path
) -> None:
    result = run(run_program, tmp_path / "truth.json", "manual clock", receiver.grpc_environment, STEPS)
    made = result["made"]
    assert len(result["truth"]) == 2 * len(STAGES) * STEPS
    assert made["synchronize"] == 0
    assert made["create"] == 0
    assert made["destroy"] == 0


@pytest.mark.usefixtures("ascend")
@pytest.mark.parametrize("mode", ["backlog", "launch-bound"])
@pytest.mark.parametrize("task_queue", ["0", "1"])
def test_durations_are_the_time_between_the_events_on_the_device(
    mode: str, task_queue: str, receiver: Receiver, run_program: RunProgram, tmp_path: Path
) -> None:
    steps = 300
    environment = {**receiver.grpc_environment, "TASK_QUEUE_ENABLE": task_queue}
    result = run(run_program, tmp_path / "truth.json", mode, environment, steps)
    receiver.wait_for((steps + result["warm_up"]) * (len(STAGES) + 1))
    arrived = [span for step in by_step(receiver.spans, result["warm_up"]) for span in step]
    truth = device_durations(result)
    if mode == "backlog":
        assert truth == result["executed"]
    assert len(arrived) == len(truth)
    for span, nanoseconds in zip(arrived, truth, strict=True):
        assert abs(span.duration_ns - nanoseconds) <= max(1000, nanoseconds * 1e-6)


def test_resolving_does_not_wait_for_a_task_that_holds_up_the_queue(ascend: Simulator, receiver: Receiver) -> None:
    """What `elapsed_time()` would do: it drains the host's task queue, even for events that are done."""
    import torch

    import otel_npu
    from otel_npu.capture import switch

    otel_npu.enable(otel_npu.Settings(export="inprocess", steps_per_second=0))
    recorder = switch.current_recorder()
    assert recorder is not None
    thread = recorder.local.thread
    held = torch.npu.current_stream().npu_stream
    backlog = ascend.hold(held)
    thread.busy = True  # nobody resolves meanwhile
    for _ in range(20):
        with otel_npu.step("decode"), otel_npu.stage("forward"):
            torch.npu._sleep(1000)
    assert torch.npu.current_stream().npu_stream == held
    ascend.release(backlog)
    torch.npu.synchronize()
    ascend.configure(dispatch_delay_ns=300_000_000)
    slow = torch.Event(device="npu", enable_timing=True)
    slow.record()
    assert recorder._resolver.resolve(thread, 100) == 20
    assert ascend.count("live_events") >= 40
    # The slow task is still being dispatched, so nothing has waited for it.
    assert not slow.query()
    thread.busy = False
    ascend.configure(dispatch_delay_ns=0)
    torch.npu.synchronize()


@pytest.mark.usefixtures("ascend")
def test_a_million_stages_leave_no_memory_and_no_event_behind(run_program: RunProgram) -> None:
    done = run_program(
        """
        from tests.helpers.ascend.simulator import Simulator
        simulator = Simulator.load()
        import torch, torch_npu
        import otel_npu

        def resident_kib():
            with open("/proc/self/status") as file:
                return next(int(line.split()[1]) for line in file if line.startswith("VmRSS"))

        def steps(count):
            for _ in range(count):
                with otel_npu.step("decode"):
                    for _ in range(100):
                        with otel_npu.stage("forward"):
                            pass

        def run(count):
            for number in range(count // 5):
                steps(5)
                torch.npu.synchronize()  # as a model does when it reads its output
                if number % 100 == 99:  # a busy machine's relay must not fall behind for megabytes
                    assert otel_npu.flush(120)

        torch.npu.set_device(0)
        # As far behind as it can be between two synchronisations, however late the dispatch thread gets to run.
        backlog = simulator.hold(torch.npu.current_stream().npu_stream)
        steps(10)
        simulator.release(backlog)
        run(1_000)
        kib, counts = resident_kib(), simulator.counts()
        run(9_000)
        after = simulator.counts()
        print(resident_kib() - kib, *(after[name] - counts[name] for name in ("live_events", "create", "record")))
        """,
        {"OTEL_NPU_ENABLED": "1", "OTEL_TRACES_EXPORTER": "none"},
        timeout=300,
    )
    grown_kib, live_events, created, recorded = map(int, done.stdout.split()[-4:])
    assert recorded >= 1_800_000
    assert (live_events, created) == (0, 0)
    assert grown_kib < 4096
