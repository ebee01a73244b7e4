"""Spans lie where the work really ran, and say how sure that is: on a fake clock, and on the real torch_npu binding."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import textwrap
import threading
import time
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

import pytest

import otel_npu
from otel_npu import semconv
from otel_npu.capture import idle as idle_module
from otel_npu.capture import switch
from otel_npu.devices.cpu import Cpu
from otel_npu.devices.npu import Npu
from otel_npu.devices.ping import ping
from otel_npu.settings import Settings
from otel_npu.wire import frames
from tests.helpers import REPOSITORY
from tests.helpers.receiver import Receiver, Span
from tests.helpers.true_time import DAY, HOST_START_NS, MS, US, Run, S, Scenario, Wall, Worker, decoded, deliver, serve

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from opentelemetry.sdk.trace import ReadableSpan

    from tests.helpers.ascend.simulator import Simulator

PINGED = {
    "0 ppm": Scenario(),
    "5 ppm, latency before": Scenario(ppm=5, latency="before", offset_ns=7 * DAY),
    "50 ppm, latency after": Scenario(ppm=50, latency="after", offset_ns=-3 * DAY),
    "-50 ppm, a third of the pings fails": Scenario(ppm=-50, failing=0.33, offset_ns=0),
    "150 ppm, no backlog": Scenario(ppm=150, backlog_ns=0, offset_ns=40 * DAY),
    "-150 ppm, latency before": Scenario(ppm=-150, latency="before", offset_ns=-HOST_START_NS + 20 * S),
}
UNPINGED = {
    "0 ppm, latency before": Scenario(pings=False, latency="before", seconds=600),
    "-5 ppm, latency after": Scenario(ppm=-5, pings=False, latency="after", offset_ns=2 * DAY, seconds=600),
    "50 ppm, no backlog": Scenario(ppm=50, pings=False, backlog_ns=0, offset_ns=DAY, seconds=600),
    "150 ppm": Scenario(ppm=150, pings=False, offset_ns=-3 * DAY),
}


class TestOnAFakeClock:
    @pytest.mark.slow
    @pytest.mark.parametrize("name", PINGED)
    def test_with_pings_spans_lie_within_microseconds_of_the_truth(self, name: str) -> None:
        run = serve(PINGED[name])
        figures = run.figures()
        assert run.broken == []
        assert run.tasks > 200 or not PINGED[name].backlog_ns
        assert figures.spans > 15_000
        assert figures.median_error <= 10
        assert figures.p99_error <= 50
        assert figures.within >= 0.999
        assert figures.median_uncertainty < 100
        assert 0.6 < run.pings / PINGED[name].seconds <= 1.1

    @pytest.mark.slow
    @pytest.mark.parametrize("name", UNPINGED)
    def test_without_any_ping_an_idle_moment_a_second_will_do(self, name: str) -> None:
        run = serve(UNPINGED[name])
        figures = run.figures()
        assert (run.broken, run.pings) == ([], 0)
        assert figures.p99_error <= 500
        assert figures.within >= 0.999

    @pytest.mark.slow
    @pytest.mark.parametrize("pings", [True, False])
    @pytest.mark.parametrize(("ppm", "offset_ns"), [(0, 123 * S), (150, 3 * DAY), (-150, -3 * DAY)])
    def test_after_a_device_reset_spans_are_right_again_within_two_seconds(
        self, ppm: float, offset_ns: int, pings: bool
    ) -> None:
        resets = (40.3, 80.7)
        run = serve(Scenario(seconds=120, ppm=ppm, offset_ns=offset_ns, pings=pings, resets=resets, kept=100))
        assert run.broken == []
        assert run.dropped.get(semconv.TIMES_UNREADABLE, 0) < 10, "only stages that began before and ended after it"
        for since, before in itertools.pairwise((0.0, *resets, 1e9)):
            after = run.figures(since + 2, before)
            assert after.spans > 1500
            assert after.max_error <= (50 if pings else 500)
            assert after.within >= 0.999

    def test_a_stage_of_seconds_says_that_its_ends_may_be_off(self) -> None:
        """Its length is by the device's clock: at 150 ppm the ends of 5 s lie 375 us from where the host has them."""
        for ppm in (150, -150):
            run = serve(Scenario(seconds=600, ppm=ppm, forward_ms=5000))
            assert run.broken == []
            assert run.figures().within >= 0.999
            assert run.figures().max_error <= 6.5 * 150 / 2 + 200

    def test_a_step_inside_a_step_lies_within_it(self) -> None:
        run = serve(Scenario(seconds=60, ppm=150, nested=True))
        assert run.broken == []
        steps = {span.context.span_id: span for *_, span in run.steps.values() if span.context}
        inner = [span for span in steps.values() if span.parent]
        assert len(inner) == len(steps) / 2 > 100
        for span in inner:
            outer = steps[span.parent.span_id if span.parent else 0]
            assert _times(outer)[0] <= _times(span)[0] <= _times(span)[1] <= _times(outer)[1]

    def test_when_pings_stop_for_a_while_nothing_breaks(self) -> None:
        run = serve(Scenario(seconds=300, ppm=50, failing=0.97))
        assert run.broken == []
        assert run.dropped[semconv.PING_UNANSWERED] > 200
        assert run.figures().within >= 0.999
        assert run.figures().p99_error <= 500

    def test_a_ping_is_given_up_within_its_budget(self) -> None:
        clock = itertools.count(0, 10)
        done = mock.Mock(return_value=False)
        assert ping(lambda: None, done, lambda: 0, 1000, lambda: next(clock)) is None
        assert done.call_count == 101


def _times(span: ReadableSpan) -> tuple[int, int]:
    assert span.start_time is not None
    assert span.end_time is not None
    return span.start_time, span.end_time


class TestOnAWallClockThatChanges:
    @staticmethod
    def off_ns(run: Run, wall: Wall) -> dict[float, list[int]]:
        """By when a step was, in seconds from the start: how far each of its spans' ends is from the truth's."""
        off: dict[float, list[int]] = {}
        for number, spans in run.steps.items():
            truths = [placed.true for placed in run.placed if placed.step == number]
            when = (truths[0].start_ns - HOST_START_NS) / S
            if when < 1:  # before the first look at the device's clock
                continue
            for span, true in zip(spans[:-1], truths, strict=True):
                for placed_ns, true_ns in zip(_times(span), true, strict=True):
                    off.setdefault(when, []).append(placed_ns - wall(true_ns - HOST_START_NS))
        return off

    @pytest.mark.parametrize("wall", [Wall(step_ns=S), Wall(step_ns=-S)], ids=["1 s ahead", "1 s back"])
    def test_when_it_is_stepped_the_spans_of_a_step_stay_together_and_later_ones_follow(self, wall: Wall) -> None:
        run = serve(Scenario(seconds=120, wall=wall, kept=3))
        assert run.broken == []
        for when, off in self.off_ns(run, wall).items():
            if not 59 < when < 62:
                assert max(map(abs, off)) < 200 * US
            # A step that it was stepped in the middle of has two truths.
            elif not 59.7 < when < 60:
                assert max(off) - min(off) < 200 * US
        for spans in run.steps.values():
            start_ns, end_ns = _times(spans[-1])
            assert all(start_ns <= _times(span)[0] <= _times(span)[1] <= end_ns for span in spans)
            assert end_ns - start_ns < 300 * MS

    @pytest.mark.parametrize("ppm", [500, -500])
    def test_when_it_is_slewed_spans_follow_by_the_second(self, ppm: int) -> None:
        wall = Wall(ppm=ppm)
        run = serve(Scenario(seconds=180, wall=wall, kept=3))
        assert run.broken == []
        for when, off in self.off_ns(run, wall).items():
            # A sample of the wall clock serves for a second and somewhat more, and a step is placed once it is done.
            slewing = 58 < when < 122
            assert max(map(abs, off)) < (200 * US + 2 * S * 500 // 1_000_000 if slewing else 200 * US)
            assert max(off) - min(off) < 250 * US


# On the real binding


PROGRAM = """
import json, math, pathlib, random, sys, time
from collections import Counter
from tests.helpers.ascend.simulator import Simulator
simulator = Simulator.load()
import torch, torch_npu
import otel_npu
from otel_npu.capture import switch

MS = 1_000_000
rng = random.Random(1)

def wall():
    "Unix time minus monotonic time, by the closest of some looks at both."
    looks = []
    for _ in range(50):
        before = time.perf_counter_ns()
        unix = time.time_ns()
        after = time.perf_counter_ns()
        looks.append((after - before, unix - (before + after) // 2))
    return min(looks)[1]

def backlog(device):
    "200 tasks that the dispatch thread takes 20 ms for; they take the device 1 ns each."
    simulator.configure(launch_dispatch_delay_ns=50_000)
    for _ in range(200):
        torch.npu._sleep(1)

def step(case, device, idle):
    pending = switch.current_recorder().local.thread.pending
    while len(pending) > (0 if idle else 1):
        time.sleep(0.001)
    torch.npu.set_device(device)
    if idle:
        torch.npu.synchronize()
        simulator.configure(launch_dispatch_delay_ns=0)
    with otel_npu.step("decode", case=case["name"], device=device):
        with otel_npu.stage("prepare_input"):
            torch.npu._sleep(rng.randrange(MS, 2 * MS))
        with otel_npu.stage("forward"):
            if case.get("backlog") and not idle:
                backlog(device)
            with otel_npu.stage("attention"):
                torch.npu._sleep(rng.randrange(5 * MS, 10 * MS))
            torch.npu._sleep(rng.randrange(10 * MS, 20 * MS))
        with otel_npu.stage("sample"):
            torch.npu._sleep(rng.randrange(MS, 2 * MS))
        if idle:
            torch.npu.synchronize()

def serve(case):
    devices = case.get("devices", [0])
    for device in devices:
        torch.npu.set_device(device)
        torch.npu._sleep(1)
        torch.npu.synchronize()
        simulator.set_clock(device, *case["clocks"][device])
    simulator.configure(**case.get("configure", {}))
    before = wall()
    otel_npu.enable(otel_npu.Settings(steps_per_second=math.inf))
    simulator.truth_start(100_000)
    began = next_idle = time.perf_counter()
    reset_at = began + case["reset_after"] if "reset_after" in case else math.inf
    numbers = Counter()
    while (now := time.perf_counter()) < began + case["seconds"]:
        if now > reset_at:
            reset_at = math.inf
            simulator.reset_device(0)
        idle = now > next_idle
        if idle:
            next_idle = now + 1
        for device in devices:
            step(case, device, idle)
    assert otel_npu.flush(120)
    simulator.truth_stop()
    truth = {}
    for device in devices:
        records = [record for record in simulator.truth() if record.device == device]
        stream = Counter(record.stream_id for record in records).most_common(1)[0][0]
        truth[device] = [record.host_ns for record in records if record.stream_id == stream]
    ended = time.perf_counter()
    otel_npu.disable()
    simulator.defaults()
    return {"truth": truth, "began": int(began * 1e9), "ended": int(ended * 1e9), "walls": (before, wall())}

torch.npu.set_device(0)
torch.npu._sleep(1)
torch.npu.synchronize()
cases, path, others = json.loads(sys.argv[1]), sys.argv[2], int(sys.argv[3])
open(path + ".ready", "w").close()
while len(list(pathlib.Path(path).parent.glob("*.ready"))) <= others:
    time.sleep(0.01)
json.dump({case["name"]: serve(case) for case in cases}, open(path, "w"))
"""

DAY_US = DAY // US
CASES: dict[str, dict[str, Any]] = {
    "150 ppm": {"clocks": [(123_456_789, 150)], "seconds": 2, "configure": {"launch_latency_ns": 20_000}},
    "0 ppm": {"clocks": [(0, 0)], "seconds": 1.5},
    "-50 ppm, 3 days apart": {
        "clocks": [(3 * DAY_US, -50)],
        "seconds": 1.5,
        "configure": {"visible_latency_ns": 30_000},
    },
    "dispatch delay": {"clocks": [(1_000_000, 5)], "seconds": 1.5, "configure": {"dispatch_delay_ns": 10_000}},
    "backlog of 200 tasks": {"clocks": [(-1_000_000, 50)], "seconds": 2.5, "backlog": True},
    "device reset": {"clocks": [(3 * DAY_US, 50)], "seconds": 4.5, "reset_after": 1.5},
    "two devices": {"clocks": [(3 * DAY_US, 100), (-5_000_000, -100)], "devices": [0, 1], "seconds": 2.5},
}
# In another process, while the first case runs in its own: two processes on one device.
NEIGHBOUR: dict[str, Any] = {"name": "neighbour", "clocks": [(-10_000_000, -150)], "seconds": 2}
STAGES = ("prepare_input", "forward", "attention", "sample")
# In the order in which the records of a step are enqueued: which stage, and whether its start or its end.
RECORDS = ((0, 0), (0, 1), (1, 0), (2, 0), (2, 1), (1, 1), (3, 0), (3, 1))


class Real(NamedTuple):
    """One span of the real binding's, against the truth; nanoseconds."""

    after_s: float
    error_ns: int
    uncertainty_ns: int
    slack_ns: int
    """How well this test knows what the wall clock showed."""


class Case(NamedTuple):
    spans: list[Real]
    host_timed: int
    process: str


def run_cases(folder: Path, receiver: Receiver, *groups: list[dict[str, Any]]) -> dict[str, Any]:
    """Run each group of cases in a process of its own, all processes at the same time under one relay."""
    folder.joinpath("program.py").write_text(textwrap.dedent(PROGRAM))
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OTEL_", "VLLM_"))}
    environment |= {
        **receiver.grpc_environment,
        "OTEL_BSP_SCHEDULE_DELAY": "100",
        # A batch that takes longer than this, for want of a processor, comes twice.
        "OTEL_EXPORTER_OTLP_TIMEOUT": "120",
        "OTEL_BSP_EXPORT_TIMEOUT": "120000",
        "OTEL_NPU_SESSION": f"true-time-{os.getpid()}",
        "XDG_RUNTIME_DIR": str(folder),
        "PYTHONPATH": str(REPOSITORY),
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, folder / "program.py", json.dumps(group), folder / f"{number}.json", str(len(groups) - 1)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number, group in enumerate(groups)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=400)
        assert process.returncode == 0, errors
    results: dict[str, Any] = {}
    for number in range(len(groups)):
        results |= json.loads((folder / f"{number}.json").read_text())
    return results


def compare(case: str, result: dict[str, Any], receiver: Receiver) -> dict[int, Case]:
    """Each device's spans of one case against what the runtime's own log says."""
    records = {int(device): truth for device, truth in result["truth"].items()}
    expected = sum(len(truth) // len(RECORDS) for truth in records.values())
    deadline = time.monotonic() + 20
    while len(steps := [s for s in receiver.named("worker_step") if s.attributes["case"] == case]) < expected:
        assert time.monotonic() < deadline, f"{len(steps)} of {expected} steps arrived"
        time.sleep(0.05)
    inside: dict[str, dict[str, Span]] = {}
    for span in receiver.spans:
        name = span.name.removesuffix(" (host)")
        if name in STAGES:
            inside.setdefault(span.trace_id, {})[name] = span
    low, high = sorted(result["walls"])
    compared = {}
    for device, truth in records.items():
        own = [step for step in steps if step.attributes["device"] == device]
        own.sort(key=lambda step: int(step.attributes["npu.step.number"]))
        assert len(own) == len(truth) // len(RECORDS)
        spans, host_timed = [], 0
        for number, step in enumerate(own):
            times = truth[len(RECORDS) * number : len(RECORDS) * (number + 1)]
            true = [[0, 0] for _ in STAGES]
            for (stage, end), host_ns in zip(RECORDS, times, strict=True):
                true[stage][end] = host_ns
            stages = inside[step.trace_id]
            for name, (start_ns, end_ns) in zip(STAGES, true, strict=True):
                span = stages[name]
                around = stages["forward"] if name == "attention" else step
                assert span.parent_span_id == around.span_id
                if span.attributes["npu.timing"] == "host":
                    host_timed += 1
                    continue
                assert span.attributes["npu.device.index"] == device
                assert step.start_ns <= span.start_ns <= span.end_ns <= step.end_ns
                if around.attributes.get("npu.timing") != "host":
                    assert around.start_ns <= span.start_ns <= span.end_ns <= around.end_ns
                assert span.attributes["npu.enqueue.delay"] >= 0
                offset_ns = (low + high) // 2
                error_ns = max(abs(span.start_ns - offset_ns - start_ns), abs(span.end_ns - offset_ns - end_ns))
                uncertainty_ns = round(span.attributes["npu.clock.uncertainty"] * 1e9)
                after_s = (start_ns - result["began"]) / S
                # 5 us for what the relay's own look at both clocks may have been off.
                spans.append(Real(after_s, error_ns, uncertainty_ns, high - low + 5 * US))
        compared[device] = Case(spans, host_timed, own[0].resource["service.instance.id"])
    return compared


def check(spans: list[Real]) -> None:
    """The truth is where the spans say that it may be.

    How narrow the brackets are is up to how busy this machine is, so that is held against the issue's microseconds on
    the fake clock; here it may only not be beyond all measure.
    """
    assert len(spans) > 20
    covered = sum(span.error_ns <= span.uncertainty_ns + span.slack_ns for span in spans)
    assert covered / len(spans) >= 0.999
    assert median(span.uncertainty_ns for span in spans) < MS


@pytest.fixture(scope="module")
def real(loaded_ascend: Simulator, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Receiver, Any]]:
    with Receiver() as receiver:
        folder = tmp_path_factory.mktemp("real")
        groups = [{"name": name, **case} for name, case in CASES.items()], [NEIGHBOUR]
        yield receiver, run_cases(folder, receiver, *groups)


@pytest.mark.slow
class TestOnTheRealBinding:
    @pytest.mark.parametrize("name", [name for name in CASES if name not in ("device reset", "two devices")])
    def test_the_truth_lies_within_the_stated_uncertainty(self, name: str, real: tuple[Receiver, Any]) -> None:
        receiver, results = real
        case = compare(name, results[name], receiver)[0]
        assert case.host_timed == 0
        check(case.spans)

    def test_after_a_device_reset_it_does_so_again_within_two_seconds(self, real: tuple[Receiver, Any]) -> None:
        receiver, results = real
        case = compare("device reset", results["device reset"], receiver)[0]
        assert case.host_timed < 10
        after = CASES["device reset"]["reset_after"]
        check([span for span in case.spans if span.after_s < after - 0.2])
        check([span for span in case.spans if span.after_s > after + 2])

    def test_each_device_of_a_process_has_its_own_map(self, real: tuple[Receiver, Any]) -> None:
        receiver, results = real
        for case in compare("two devices", results["two devices"], receiver).values():
            assert case.host_timed == 0
            check(case.spans)

    def test_each_process_on_a_device_has_its_own_map(self, real: tuple[Receiver, Any]) -> None:
        receiver, results = real
        names = (next(iter(CASES)), "neighbour")
        one, other = (results[name] for name in names)
        assert one["began"] < other["ended"], "they ran at the same time"
        assert other["began"] < one["ended"], "they ran at the same time"
        cases = [compare(name, results[name], receiver)[0] for name in names]
        assert cases[0].process != cases[1].process
        for case in cases:
            check(case.spans)


# Pings on the real binding


class Pinging:
    """A recorder on the real binding whose pings are sent when a test says so, and its frames."""

    def __init__(self) -> None:
        # A device of its own, because the process's keeps its events for whoever turns tracing on next.
        self.worker = Worker(Settings(export="inprocess", steps_per_second=0), Npu.open())
        self.sent: list[frames.Frame] = []
        deliver(self.worker.channel, lambda packet: self.sent.extend(decoded(packet)))

    @property
    def pings(self) -> list[frames.Ping]:
        return [frame for frame in self.sent if isinstance(frame, frames.Ping)]

    def ping(self, times: int = 1) -> list[frames.Ping]:
        """What came of so many pings."""
        known = len(self.pings)
        for _ in range(times):
            self.worker.idle.ping()
        return self.pings[known:]

    def dropped(self) -> dict[str, int]:
        return self.worker.drops.take_unsent()


@pytest.fixture
def pinging(ascend: Simulator) -> Iterator[Pinging]:
    """A process that has captured a stage on device 0."""
    running = Pinging()
    with mock.patch.object(switch, "_recorder", running.worker):
        with otel_npu.stage("forward"):
            pass
        yield running


def wait_for_answer(pinging: Pinging) -> None:
    """At least one ping is answered, however busy this machine is: its stream and event exist from then on."""
    deadline = time.monotonic() + 20
    while not pinging.ping():
        assert time.monotonic() < deadline
    pinging.dropped()


class TestPings:
    def test_one_is_a_look_at_the_devices_clock(self, pinging: Pinging, ascend: Simulator) -> None:
        ascend.set_clock(0, 3 * DAY_US, 0)
        wait_for_answer(pinging)
        (last,) = pinging.pings
        assert last.device_index == 0
        # It is truncated to whole microseconds.
        assert last.before_ns - US <= last.device_ns - 3 * DAY <= last.seen_ns
        assert last.seen_ns - last.before_ns < 20 * MS

    def test_after_the_first_they_make_no_events(self, pinging: Pinging, ascend: Simulator) -> None:
        wait_for_answer(pinging)
        before = ascend.counts()
        pinging.ping(50)
        made = {name: count - before[name] for name, count in ascend.counts().items()}
        assert made["record"] == 50
        assert (made["create"], made["synchronize"]) == (0, 0)

    def test_there_is_about_one_a_second_and_none_when_tracing_is_off(
        self, ascend: Simulator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Sped up by 10, or it takes 10 times as long."""
        assert idle_module.WATCH_SECONDS >= 1
        monkeypatch.setattr(idle_module, "WATCH_SECONDS", 0.1)
        before = ascend.count("record")
        otel_npu.enable(Settings(export="inprocess", steps_per_second=0))
        began = time.perf_counter()
        with otel_npu.stage("forward"):
            pass
        time.sleep(0.75)
        otel_npu.disable()
        took = time.perf_counter() - began
        pings = ascend.count("record") - before - 2
        assert 1 <= pings <= took * 10 + 1
        time.sleep(0.3)
        assert ascend.count("record") == before + 2 + pings

    def test_there_is_none_of_a_device_that_no_stage_has_used(self, pinging: Pinging, ascend: Simulator) -> None:
        idle = Pinging()
        before = ascend.count("record")
        assert idle.ping() == []
        assert ascend.count("record") == before

    def test_there_is_none_while_a_thread_captures_a_graph(self, pinging: Pinging, ascend: Simulator) -> None:
        import torch

        wait_for_answer(pinging)
        captures, done = threading.Event(), threading.Event()

        def capture() -> None:
            torch.npu.set_device(0)
            with torch.npu.stream(torch.npu.Stream()):
                graph = torch.npu.NPUGraph()
                graph.capture_begin()
                with otel_npu.stage("captured"):
                    torch.npu._sleep(1000)
                captures.set()
                done.wait(20)
                graph.capture_end()

        thread = threading.Thread(target=capture)
        thread.start()
        try:
            assert captures.wait(20)
            before = ascend.count("record")
            assert pinging.ping(20) == []
            assert ascend.count("record") == before
        finally:
            done.set()
            thread.join()
        dropped = pinging.dropped()
        assert dropped == {semconv.STREAM_CAPTURED: 1}
        wait_for_answer(pinging)

    def test_none_leaves_during_a_capture_in_which_no_stage_runs(self, pinging: Pinging, ascend: Simulator) -> None:
        import torch

        wait_for_answer(pinging)
        with torch.npu.graph(torch.npu.NPUGraph()):
            torch.npu._sleep(1000)
            before = ascend.count("record")
            assert pinging.ping(20) == []
            assert ascend.count("record") == before
        wait_for_answer(pinging)

    def test_one_without_an_answer_is_given_up_and_counted(self, pinging: Pinging, ascend: Simulator) -> None:
        wait_for_answer(pinging)
        ascend.configure(visible_latency_ns=500 * MS)
        assert pinging.ping(50) == []
        assert pinging.dropped() == {semconv.PING_UNANSWERED: 50}

    @pytest.mark.parametrize("call", ["record", "query", "timestamp"])
    def test_an_error_in_one_is_counted_and_never_reaches_the_model(
        self, pinging: Pinging, ascend: Simulator, call: Any
    ) -> None:
        import torch

        wait_for_answer(pinging)
        ascend.fail(call, 507015)
        assert pinging.ping() == []
        assert pinging.dropped() == {semconv.PING_UNANSWERED: 1}
        torch.npu._sleep(1000)
        with otel_npu.stage("forward"):
            pass
        torch.npu.synchronize()
        assert switch.current_recorder() is pinging.worker, "tracing is still on"
        wait_for_answer(pinging)

    def test_an_error_when_its_event_is_made_is_counted_and_the_next_tries_again(
        self, pinging: Pinging, ascend: Simulator
    ) -> None:
        ascend.fail("create", 507015)
        assert pinging.ping() == []
        assert pinging.dropped() == {semconv.PING_UNANSWERED: 1}
        wait_for_answer(pinging)

    def test_they_are_answered_while_200_tasks_hold_up_the_hosts_queue(
        self, pinging: Pinging, ascend: Simulator
    ) -> None:
        import torch

        wait_for_answer(pinging)
        ascend.configure(launch_dispatch_delay_ns=2 * MS)
        for _ in range(200):
            torch.npu._sleep(1000)
        behind = torch.Event(device="npu", enable_timing=True)
        behind.record()
        answered = len(pinging.ping(50))
        assert not behind.query(), "the queue was held up all the while"
        ascend.configure(launch_dispatch_delay_ns=0)
        # On a side stream of torch's it would be none. All but a few, if nobody else keeps this machine busy.
        assert answered >= 10

    def test_there_is_none_on_the_cpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Cpu, "ping", lambda *_: pytest.fail("pinged"))
        worker = Worker(Settings(export="inprocess", device="cpu"), Cpu())
        with mock.patch.object(switch, "_recorder", worker), otel_npu.stage("forward"):
            pass
        worker.idle.ping()
        assert worker.drops.take_unsent() == {}
