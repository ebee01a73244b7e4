"""The backend for any other torch accelerator, run on torch_npu: it uses the generic `torch.Event` alone."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest

import otel_npu
from otel_npu.devices.device import Pair, Pool
from otel_npu.devices.torch_event import stream_key
from tests.helpers.capturing import MILLISECOND, SECOND, Captured, capturing

if TYPE_CHECKING:
    from collections.abc import Iterator

    from otel_npu.devices.torch_event import TorchEvents
    from otel_npu.wire import frames
    from tests.helpers.ascend.simulator import Simulator


@pytest.fixture
def device(torch_npu: Any) -> TorchEvents:
    from otel_npu.devices.torch_event import TorchEvents

    return TorchEvents("npu")


@pytest.fixture
def tracing(ascend: Simulator, device: TorchEvents) -> Iterator[Captured]:
    ascend.manual_clock(True)
    with capturing(device) as captured:
        yield captured
        ascend.manual_clock(False)


def steps(tracing: Captured, ascend: Simulator, torch: Any, microseconds: float = 1e6) -> list[frames.Step]:
    """The steps so far, after so much more time."""
    torch.npu.current_stream().npu_stream  # noqa: B018  waits until all has been dispatched
    ascend.advance(microseconds)
    return tracing.steps()


def run(torch: Any, *milliseconds: int) -> None:
    with otel_npu.step():
        for number, length in enumerate(milliseconds):
            with otel_npu.stage(f"{number}"):
                torch.npu._sleep(length * MILLISECOND)


def test_durations_and_places_are_what_the_device_executed(
    tracing: Captured, ascend: Simulator, torch_npu: Any
) -> None:
    run(torch_npu, 1, 5, 2)
    steps(tracing, ascend, torch_npu, 100_000)
    run(torch_npu, 3)
    first, second = steps(tracing, ascend, torch_npu)
    assert [stage.duration_ns for stage in first.stages] == pytest.approx(
        [MILLISECOND, 5 * MILLISECOND, 2 * MILLISECOND], abs=100
    )
    assert [stage.device_ns for stage in first.stages] == pytest.approx([0, MILLISECOND, 6 * MILLISECOND], abs=100)
    assert second.stages[0].device_ns == pytest.approx(100 * MILLISECOND, abs=1000)
    assert second.stages[0].duration_ns == pytest.approx(3 * MILLISECOND, abs=100)


def test_it_counts_from_newer_events_as_time_goes_by_and_makes_none(
    tracing: Captured, ascend: Simulator, torch_npu: Any
) -> None:
    run(torch_npu, 1, 2)
    steps(tracing, ascend, torch_npu, 5e6)
    run(torch_npu, 1, 2)
    steps(tracing, ascend, torch_npu, 5e6)
    created = ascend.count("create")
    for _ in range(10):
        run(torch_npu, 1, 2)
        arrived = steps(tracing, ascend, torch_npu, 5e6)
    assert ascend.count("create") == created
    assert len(arrived) == 12
    for number, step in enumerate(arrived):
        assert [stage.device_ns for stage in step.stages] == pytest.approx(
            [number * 5 * SECOND, number * 5 * SECOND + MILLISECOND], abs=10_000
        )
        assert [stage.duration_ns for stage in step.stages] == pytest.approx([MILLISECOND, 2 * MILLISECOND], abs=100)


def test_what_profile_execute_duration_has_read_stays_right(
    tracing: Captured, ascend: Simulator, torch_npu: Any
) -> None:
    durations = otel_npu.ProfileExecuteDuration()
    with otel_npu.step():
        with durations.capture_async("forward"):
            torch_npu.npu._sleep(4 * MILLISECOND)
        assert durations.pop_captured_sync() == {"forward": pytest.approx(4, abs=0.001)}
        with otel_npu.stage("sample"):
            torch_npu.npu._sleep(MILLISECOND)
    (step,) = steps(tracing, ascend, torch_npu)
    assert [stage.duration_ns for stage in step.stages] == pytest.approx([4 * MILLISECOND, MILLISECOND], abs=100)
    assert "times_unreadable" not in tracing.dropped()


def test_streams_and_devices_are_told_apart(device: TorchEvents, torch_npu: Any) -> None:
    def key() -> Any:
        return stream_key(device.current_stream())

    default = key()
    assert key() == default
    with torch_npu.npu.stream(torch_npu.npu.Stream()):
        assert key() != default
    with torch_npu.npu.device(1):
        assert key() != default
    assert key() == default


def test_it_knows_a_stream_that_is_being_captured(device: TorchEvents, torch_npu: Any) -> None:
    assert not device.capturing()
    with torch_npu.npu.graph(torch_npu.npu.NPUGraph()):
        assert device.capturing()


def test_it_names_the_chip(device: TorchEvents) -> None:
    assert device.name(0).startswith("Ascend")


class Event:
    """An event at a fixed time. Asked how far it is from another, it lets somebody else go on first."""

    def __init__(self, time_ms: float, meanwhile: Any = lambda: None) -> None:
        self.time_ms = time_ms
        self.meanwhile = meanwhile

    def record(self, _: object) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        end.meanwhile()
        return end.time_ms - self.time_ms


def test_two_threads_that_read_at_once_put_no_event_into_two_pairs(device: TorchEvents) -> None:
    pool = Pool(device, 0)
    device.read(0, [Pair(pool, Event(0), Event(1))])
    other = Pair(pool, Event(5001), Event(5002))
    other_read = threading.Event()

    def read_other() -> None:
        device.read(0, [other])
        other_read.set()

    thread = threading.Thread(target=read_other)

    def meanwhile() -> None:
        thread.start()
        other_read.wait(0.2)  # it either waits for us, or comes in between: then it is done at once

    first = Pair(pool, Event(5000), Event(5001))
    first.end.meanwhile = meanwhile
    device.read(0, [first])
    thread.join()
    assert first.start is not other.start
