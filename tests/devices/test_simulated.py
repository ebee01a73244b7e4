"""The simulated NPU: what it says of time is what was launched."""

from __future__ import annotations

import itertools
import threading
from typing import TYPE_CHECKING

import pytest

from otel_npu.devices.device import Pair, Pool
from otel_npu.devices.ping import ping
from otel_npu.devices.simulated import SimulatedNpu
from tests.helpers.capturing import MILLISECOND, SECOND, Clock, simulated

if TYPE_CHECKING:
    from otel_npu.devices.simulated import SimulatedStream


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def device(clock: Clock) -> SimulatedNpu:
    return simulated(clock)


def pair(device: SimulatedNpu) -> Pair:
    pair = Pool(device, 0).grow()
    assert pair is not None
    return pair


def measure(device: SimulatedNpu, duration_ns: int, stream: SimulatedStream | None = None) -> tuple[int, int]:
    """Start and duration of a kernel between two events."""
    device.use(stream or device.default_stream)
    events = pair(device)
    events.record_start(device.current_stream())
    device.launch(duration_ns)
    events.record_end(device.current_stream())
    return device.read(0, [events])[0]


def test_a_kernel_takes_what_was_launched(device: SimulatedNpu, clock: Clock) -> None:
    assert measure(device, 5 * MILLISECOND) == (clock.ns + SECOND, 5 * MILLISECOND)


def test_a_stream_works_in_order(device: SimulatedNpu, clock: Clock) -> None:
    measure(device, 5 * MILLISECOND)
    assert measure(device, MILLISECOND) == (clock.ns + 5 * MILLISECOND + SECOND, MILLISECOND)


def test_streams_work_beside_each_other(device: SimulatedNpu, clock: Clock) -> None:
    measure(device, 5 * MILLISECOND)
    assert measure(device, MILLISECOND, device.new_stream()) == (clock.ns + SECOND, MILLISECOND)


def test_what_is_between_two_events_is_measured_waits_included(device: SimulatedNpu, clock: Clock) -> None:
    events = pair(device)
    events.record_start(device.default_stream)
    clock.ns += 3 * MILLISECOND
    device.launch(MILLISECOND)
    events.record_end(device.default_stream)
    assert device.read(0, [events])[0][1] == 4 * MILLISECOND


def test_an_event_is_done_when_its_stream_has_got_to_it(device: SimulatedNpu, clock: Clock) -> None:
    event = device.new_event(0)
    assert event.query(), "never recorded"
    device.launch(MILLISECOND)
    event.record(device.default_stream)
    assert not event.query()
    clock.ns += MILLISECOND - 1
    assert not event.query()
    clock.ns += 1
    assert event.query()


def test_waiting_takes_until_the_work_is_done() -> None:
    device = SimulatedNpu()
    device.launch(2 * MILLISECOND)
    event = device.new_event(0)
    event.record(device.default_stream)
    event.synchronize()
    assert event.query()
    device.launch(2 * MILLISECOND)
    device.synchronize()
    assert device.now() >= device.default_stream.busy_until_ns


def test_each_thread_has_a_current_stream(device: SimulatedNpu) -> None:
    side = device.new_stream()
    device.use(side)
    others: list[SimulatedStream] = []
    thread = threading.Thread(target=lambda: others.append(device.current_stream()))
    thread.start()
    thread.join()
    assert device.current_stream() is side
    assert others == [device.default_stream]


def test_its_clock_is_off_and_drifts(clock: Clock) -> None:
    device = SimulatedNpu(clock, offset_ns=7 * SECOND, drift_ppm=10)
    assert device.device_time(clock.ns) == clock.ns + 7 * SECOND
    clock.ns += 100 * SECOND
    assert device.device_time(clock.ns) == clock.ns + 7 * SECOND + MILLISECOND


def test_its_times_are_whole_ticks(device: SimulatedNpu, clock: Clock) -> None:
    clock.ns += 7
    start_ns, duration_ns = measure(device, 45)
    assert (start_ns % 20, duration_ns % 20) == (0, 0)
    assert abs(duration_ns - 45) < 20


def test_a_ping_says_what_its_clock_shows(device: SimulatedNpu, clock: Clock) -> None:
    device.launch(SECOND)  # which it does not wait for
    answer = device.ping(0, 1000)
    assert answer is not None
    assert (answer.device_ns, answer.before_ns, answer.seen_ns) == (clock.ns + SECOND, clock.ns, clock.ns)


def test_a_look_at_the_clock_that_takes_longer_than_its_budget_is_given_up() -> None:
    now = itertools.count(step=40)
    assert ping(lambda: None, lambda: False, lambda: 0, 100, lambda: next(now)) is None
    assert next(now) == 160  # at 0 it was recorded; at 40 and 80 there was time left, at 120 there was none
