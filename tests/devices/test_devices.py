"""Which device is found, and what the NPU's does on the real torch_npu binding."""

from __future__ import annotations

import sys
import types
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

import otel_npu
from otel_npu import devices
from otel_npu.devices.cpu import Cpu
from otel_npu.devices.simulated import SimulatedNpu
from tests.helpers.capturing import MILLISECOND, Captured, capturing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from otel_npu.wire import frames
    from tests.helpers.ascend.simulator import Simulator


def torch_with(accelerator: str | None, *, initialised: bool = True) -> Any:
    """What of torch is asked for the device."""
    current = None if accelerator is None else types.SimpleNamespace(type=accelerator)
    torch = types.SimpleNamespace(accelerator=types.SimpleNamespace(current_accelerator=lambda: current))
    if accelerator is not None:
        setattr(torch, accelerator, types.SimpleNamespace(is_initialized=lambda: initialised))
    return torch


def no_timing(**_: Any) -> None:
    """A generic event before torch_npu 2.6."""
    raise AssertionError("it would carry no timing")


class TestFinding:
    @pytest.fixture
    def imported(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
        return lambda torch: monkeypatch.setitem(sys.modules, "torch", torch)

    def test_what_needs_no_torch_is_there(self) -> None:
        assert isinstance(devices.find("cpu"), Cpu)
        simulated = devices.find("simulated")
        assert isinstance(simulated, SimulatedNpu)
        assert devices.find("simulated") is simulated

    @pytest.mark.parametrize("kind", ["auto", "npu", "cuda"])
    def test_without_torch_it_is_an_open_question(
        self, kind: str, imported: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delitem(sys.modules, "torch", raising=False)
        assert devices.find(kind) is None
        imported(types.SimpleNamespace())  # while torch is being imported
        assert devices.find(kind) is None

    def test_where_torch_has_no_accelerator_it_is_the_host(self, imported: Callable[[Any], None]) -> None:
        imported(torch_with(None))
        assert isinstance(devices.find("auto"), Cpu)
        assert devices.find("npu") is None, "torch_npu may still be imported"
        with pytest.raises(ValueError, match="built without"):
            devices.find("cuda")

    @pytest.mark.parametrize("kind", ["auto", "npu"])
    def test_before_the_program_has_initialised_it_no_device_is_touched(
        self, kind: str, imported: Callable[[Any], None]
    ) -> None:
        imported(torch_with("npu", initialised=False))
        assert devices.find(kind) is None

    def test_before_torch_2_6_it_is_torch_npus(
        self, imported: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "torch_npu", types.ModuleType("torch_npu"))
        imported(types.SimpleNamespace(npu=types.SimpleNamespace(is_initialized=lambda: False)))
        assert devices.find("auto") is devices.find("npu") is None
        with pytest.raises(ValueError, match="torch's accelerator here is 'npu'"):
            devices.find("cuda")

    def test_another_accelerator_than_torchs_can_not_be(self, imported: Callable[[Any], None]) -> None:
        imported(torch_with("npu", initialised=False))
        with pytest.raises(ValueError, match="torch's accelerator here is 'npu'"):
            devices.find("cuda")


def test_without_torch_the_host_is_timed_until_a_device_is_known(run_program: Callable[..., Any]) -> None:
    done = run_program(
        """
        import otel_npu
        from otel_npu.capture import switch
        with otel_npu.step(), otel_npu.stage("forward"):
            pass
        recorder = switch.current_recorder()
        print(recorder.device.kind, recorder.device_is_open_question, otel_npu.flush(20))
        """,
        {"OTEL_NPU_ENABLED": "1", "OTEL_NPU_EXPORT": "inprocess", "OTEL_TRACES_EXPORTER": "none"},
    )
    assert done.stdout == "cpu True True\n"


@pytest.mark.slow
@pytest.mark.usefixtures("ascend")
def test_the_npu_is_used_from_when_the_program_has_chosen_it_and_not_before(run_program: Callable[..., Any]) -> None:
    done = run_program(
        """
        from tests.helpers.ascend.simulator import Simulator
        simulator = Simulator.load()
        import torch, torch_npu
        import otel_npu
        from otel_npu.capture import switch
        before = simulator.counts()
        def step():
            with otel_npu.step(), otel_npu.stage("forward"):
                pass
            assert otel_npu.flush(20)
            return switch.current_recorder().device.kind
        print(step(), simulator.counts() == before, torch.npu.is_initialized())
        torch.npu.set_device(1)
        print(step(), simulator.count("record"), torch.npu.current_device())
        """,
        {"OTEL_NPU_ENABLED": "1", "OTEL_NPU_EXPORT": "inprocess", "OTEL_TRACES_EXPORTER": "none"},
    )
    first, second = done.stdout.splitlines()[-2:]  # before them torch_npu speaks
    assert first == "cpu True False"
    kind, records, device = second.split()
    assert (kind, device) == ("npu", "1")
    assert int(records) >= 2


@pytest.mark.slow
@pytest.mark.usefixtures("ascend")
def test_a_device_that_is_not_here_is_one_clear_line_and_the_program_runs_on(run_program: Callable[..., Any]) -> None:
    done = run_program(
        """
        from tests.helpers.ascend.simulator import Simulator
        simulator = Simulator.load()
        import torch, torch_npu
        import otel_npu
        from otel_npu.capture import switch
        for _ in range(3):
            with otel_npu.step(), otel_npu.stage("forward"):
                torch.npu.set_device(0)
        print("ran", switch.current_recorder(), simulator.count("record"))
        """,
        {"OTEL_NPU_ENABLED": "1", "OTEL_NPU_DEVICE": "cuda", "OTEL_TRACES_EXPORTER": "none"},
    )
    assert done.stdout.splitlines()[-1] == "ran None 0"
    lines = [line for line in done.stderr.splitlines() if "OTEL_NPU" in line or "tracing" in line]
    assert lines == ["OTEL_NPU_DEVICE='cuda': torch's accelerator here is 'npu', not 'cuda'; tracing is off"]


class TestNpu:
    """On torch_npu itself, with the simulated runtime behind it and its clock stopped.

    Once by generic events, once by torch_npu's own, as before torch_npu 2.6.
    """

    @pytest.fixture(params=["2.6 and newer", "older"])
    def npu(
        self, request: pytest.FixtureRequest, ascend: Simulator, torch_npu: Any, monkeypatch: pytest.MonkeyPatch
    ) -> Iterator[Captured]:
        from otel_npu.devices.npu import Npu

        if request.param == "older":
            import torch_npu as binding

            monkeypatch.delattr(torch_npu, "accelerator")
            monkeypatch.delattr(torch_npu._C, "_accelerator_getStream")
            monkeypatch.delattr(binding._C, "_npu_getCurrentRawStreamNoWait")
            monkeypatch.setattr(torch_npu, "Event", no_timing)
        ascend.manual_clock(True)
        with capturing(Npu.open()) as captured:
            yield captured
            ascend.manual_clock(False)
        torch_npu.npu.set_device(0)

    @staticmethod
    def steps(npu: Captured, ascend: Simulator, torch: Any) -> list[frames.Step]:
        for device in range(2):
            with torch.npu.device(device):
                torch.npu.current_stream().npu_stream  # noqa: B018  waits until all has been dispatched
        ascend.advance(10e6)
        return npu.steps()

    def test_stages_inside_a_graph_capture_are_left_out_and_what_follows_is_right(
        self, npu: Captured, ascend: Simulator, torch_npu: Any
    ) -> None:
        torch = torch_npu

        def step(kind: str, milliseconds: int) -> None:
            with otel_npu.step(kind), otel_npu.stage("forward"):
                torch.npu._sleep(milliseconds * MILLISECOND)

        graph = torch.npu.NPUGraph()
        step("before", 1)
        self.steps(npu, ascend, torch)
        with torch.npu.graph(graph):
            step("captured", 5)
        with otel_npu.step("replay"), otel_npu.stage("forward"):
            graph.replay()
        step("after", 3)
        steps = self.steps(npu, ascend, torch)
        assert {step.kind: [stage.duration_ns for stage in step.stages] for step in steps} == {
            "before": [pytest.approx(MILLISECOND, abs=1000)],
            "captured": [],
            "replay": [pytest.approx(5 * MILLISECOND, abs=1000)],
            "after": [pytest.approx(3 * MILLISECOND, abs=1000)],
        }
        assert None not in [stage.device_ns for step in steps for stage in step.stages]
        assert npu.dropped()["stream_captured"] == 1

    def test_each_record_is_given_its_stream_and_none_synchronises(
        self, npu: Captured, ascend: Simulator, torch_npu: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        streams: list[Any] = []
        record = torch_npu.npu.Event.record

        def recorded(event: Any, stream: Any = None) -> None:
            streams.append(stream)
            record(event, stream)

        monkeypatch.setattr(torch_npu.npu.Event, "record", recorded)
        own_events = not hasattr(torch_npu, "accelerator")
        synchronisations = ascend.count("synchronize")
        with otel_npu.step():
            for name in ("prepare_input", "forward"):
                with otel_npu.stage(name):
                    torch_npu.npu._sleep(MILLISECOND)
        (step,) = self.steps(npu, ascend, torch_npu)
        assert [stage.duration_ns for stage in step.stages] == pytest.approx([MILLISECOND] * 2, abs=1000)
        assert ascend.count("synchronize") == synchronisations
        assert len(streams) == (4 if own_events else 0)
        assert all(isinstance(stream, torch_npu.npu.Stream) for stream in streams)

    def test_streams_and_devices_are_told_apart(self, npu: Captured, ascend: Simulator, torch_npu: Any) -> None:
        torch = torch_npu
        side = torch.npu.Stream()
        with otel_npu.step():
            with otel_npu.stage("default"):
                torch.npu._sleep(MILLISECOND)
            with torch.npu.stream(side), otel_npu.stage("side"):
                torch.npu._sleep(2 * MILLISECOND)
            torch.npu.set_device(1)
            with otel_npu.stage("other device"):
                torch.npu._sleep(3 * MILLISECOND)
            torch.npu.set_device(0)
            with otel_npu.stage("back"):
                torch.npu._sleep(4 * MILLISECOND)
        (step,) = self.steps(npu, ascend, torch)
        assert [(stage.name, stage.device_index) for stage in step.stages] == [
            ("default", 0),
            ("side", 0),
            ("other device", 1),
            ("back", 0),
        ]
        milliseconds = [stage.duration_ns / MILLISECOND for stage in step.stages]
        assert milliseconds == pytest.approx([1, 2, 3, 4], abs=0.001)
        assert {s.name: s.stream_id for s in step.stages}["side"] == side.stream_id != 0

    def test_another_thread_can_tell_that_a_stream_is_being_captured(self, npu: Captured, torch_npu: Any) -> None:
        stream = torch_npu.npu.Stream()

        def captured() -> bool:
            with torch_npu.npu.stream(stream):
                key = npu.device.current_stream_key()
            with ThreadPoolExecutor(1) as other:
                return other.submit(npu.device.captured, key).result(20)

        assert captured() is False
        with torch_npu.npu.graph(torch_npu.npu.NPUGraph(), stream=stream):
            assert captured() is True
        assert captured() is False

    def test_flushing_leaves_the_callers_device_as_it_is(
        self, npu: Captured, ascend: Simulator, torch_npu: Any
    ) -> None:
        with otel_npu.step(), otel_npu.stage("forward"):
            torch_npu.npu._sleep(MILLISECOND)
        torch_npu.npu.set_device(1)
        self.steps(npu, ascend, torch_npu)
        assert torch_npu.npu.current_device() == 1

    @pytest.mark.parametrize("call", ["query", "timestamp", "elapsed"])
    def test_a_failing_call_costs_that_step_its_device_times(
        self, npu: Captured, ascend: Simulator, torch_npu: Any, call: Any
    ) -> None:
        def step(kind: str) -> frames.Step:
            with otel_npu.step(kind), otel_npu.stage("forward"):
                torch_npu.npu._sleep(MILLISECOND)
            return self.steps(npu, ascend, torch_npu)[-1]

        ascend.fail(call, 507015, times=1000)
        first = step("first")
        ascend.fail(call, 0, times=0)
        assert first.stages[0].device_ns is None
        assert step("second").stages[0].duration_ns == pytest.approx(MILLISECOND, abs=1000)
        assert npu.dropped()["times_unreadable"] == 1

    def test_profile_execute_duration_waits_and_says_what_ran(
        self, npu: Captured, ascend: Simulator, torch_npu: Any
    ) -> None:
        durations = otel_npu.ProfileExecuteDuration()
        with otel_npu.step():
            with durations.capture_async("forward"):
                torch_npu.npu._sleep(4 * MILLISECOND)
            assert durations.pop_captured_sync() == {"forward": pytest.approx(4, abs=0.001)}
        (step,) = self.steps(npu, ascend, torch_npu)
        assert step.stages[0].duration_ns == pytest.approx(4 * MILLISECOND, abs=1000)


@pytest.mark.slow
@pytest.mark.usefixtures("ascend")
def test_a_failed_launch_of_the_models_reaches_the_model_once_and_tracing_is_off(
    run_program: Callable[..., Any],
) -> None:
    done = run_program(
        """
        import os, time
        from tests.helpers.ascend.simulator import Simulator
        simulator = Simulator.load()
        import torch, torch_npu
        import otel_npu
        torch.npu.set_device(0)
        torch.npu._sleep(1)
        torch.npu.synchronize()
        with otel_npu.step("decode"), otel_npu.stage("forward"):
            torch.npu._sleep(1000)
        assert otel_npu.flush(20)

        launches = simulator.count("launch")
        simulator.fail("launch", 507015)
        torch.npu._sleep(1000)  # the model's: it fails later, on the dispatch thread
        while simulator.count("launch") == launches:
            time.sleep(0.001)
        errors = []
        for _ in range(100):
            try:
                with otel_npu.step("decode"), otel_npu.stage("forward"):
                    time.sleep(0.01)
            except RuntimeError as error:
                errors.append(error)
        error, = errors
        print("aclnnSleep" in str(error), error.__cause__, error.__context__)
        print(otel_npu.stage("forward") is otel_npu.stage("forward"), flush=True)
        os._exit(0)  # with its queue broken torch_npu may wait for ever at exit
        """,
        {"OTEL_NPU_ENABLED": "1", "OTEL_TRACES_EXPORTER": "none", "TASK_QUEUE_ENABLE": "1"},
    )
    assert done.stdout.splitlines()[-2:] == ["True None None", "True"]
    lines = [line for line in done.stderr.splitlines() if "tracing is off" in line]
    assert len(lines) == 1
