"""A signal handler raises inside each call that capture makes: it is the program's, and nothing else is lost.


`test_interrupts` strikes at random, between any two lines; here every call is struck once.
"""

from __future__ import annotations

import signal
import threading
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

import otel_npu
from otel_npu.capture import context, resolver, steps
from otel_npu.capture.context import Limiter
from otel_npu.capture.recorder import Recorder
from otel_npu.devices.device import Pool
from otel_npu.devices.simulated import SimulatedEvent, SimulatedNpu
from otel_npu.wire import frames
from otel_npu.wire.channel import Channel
from tests.helpers.capturing import MILLISECOND, SECOND, Clock, capturing

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.helpers.capturing import Captured


class SoftTimeLimitError(Exception):
    """As a task queue raises it in a handler."""


@pytest.fixture(autouse=True)
def handler() -> Iterator[None]:
    def strike(*_: object) -> None:
        raise SoftTimeLimitError

    before = signal.signal(signal.SIGUSR1, strike)
    yield
    signal.signal(signal.SIGUSR1, before)


class Device(SimulatedNpu):
    """The ways that are looked up when capture begins can be struck too."""

    def __init__(self, now: Clock) -> None:
        super().__init__(now, offset_ns=SECOND, drift_ppm=0)
        self.current_stream = lambda: self._current_stream()  # noqa: PLW0108
        self.current_stream_key = lambda: self._current_stream()  # noqa: PLW0108


class Strike:
    """From now on a signal arrives in the midst of the n-th call of this function, before or after its work."""

    def __init__(self, patch: pytest.MonkeyPatch, where: Any, name: str, number: int, *, late: bool) -> None:
        function = getattr(where, name)
        self.calls = 0

        def struck(*args: Any, **kwargs: Any) -> Any:
            if threading.current_thread() is not threading.main_thread():  # where no handler runs
                return function(*args, **kwargs)
            self.calls += 1
            if self.calls == number and not late:
                signal.raise_signal(signal.SIGUSR1)
            result = function(*args, **kwargs)
            if self.calls == number and late:
                signal.raise_signal(signal.SIGUSR1)
            return result

        patch.setattr(where, name, struck)


ON_THE_WAY_IN = {
    "the parent": (context, "active_span", 1),
    "the rate": (Limiter, "allow", 1),
    "the step's ids": (steps.Step, "_choose", 1),
    "the stream": (Device, "_current_stream", 1),
    "the graph": (Device, "capturing", 1),
    "an event that is made": (Device, "new_event", 2),
    "one more pair": (Pool, "grow", 1),
    "the start's record": (SimulatedEvent, "record", 1),
    "the end's record": (SimulatedEvent, "record", 2),
    "the stage of no step": (steps.Step, "undo", 1),
    "the boundary": (Recorder, "step_closed", 1),
}


def one_step(captured: Captured) -> None:
    with otel_npu.step("decode"), otel_npu.stage("forward"):
        captured.device.launch(MILLISECOND)
    with otel_npu.stage("alone"):
        captured.device.launch(MILLISECOND)


def told(captured: Captured) -> list[frames.Step]:
    """All that has arrived, whether something is lost or not."""
    captured.clock.ns += SECOND
    otel_npu.flush(60)
    return [frame for frame in captured.sent if isinstance(frame, frames.Step)]


def dropped(captured: Captured) -> Counter[str]:
    counts: Counter[str] = Counter(captured.recorder.drops.take_unsent())
    for step in told(captured):
        counts.update(step.dropped)
    return counts


def all_is_as_before(captured: Captured) -> None:
    """Tracing is on, the next step is whole and nobody's child, and every event is free or waits with a step."""
    captured.clock.ns += 10 * MILLISECOND
    with otel_npu.step("after"):
        captured.stage("inside")
    captured.stage("outside")
    *_, inside, outside = told(captured)
    assert (inside.kind, inside.parent_span_id, [stage.name for stage in inside.stages]) == ("after", b"", ["inside"])
    assert [stage.name for stage in outside.stages] == ["outside"]
    assert inside.stages[0].device_ns is not None
    for thread in captured.recorder.threads:
        assert not thread.pending
        assert not [step for step in thread.open.values() if not step.closed_ns]
    counts = Counter(id(pair) for pool in captured.device.pools.values() for pair in pool.free)
    assert set(counts.values()) <= {1}  # none is free twice


@pytest.mark.parametrize("late", [False, True], ids=["before it works", "after it"])
@pytest.mark.parametrize("call", ON_THE_WAY_IN)
def test_on_the_programs_way_it_reaches_the_program(monkeypatch: pytest.MonkeyPatch, call: str, late: bool) -> None:
    where, name, number = ON_THE_WAY_IN[call]
    side_stream = call == "the graph"
    with capturing(Device(Clock())) as captured:
        if side_stream:
            captured.device.use(captured.device.new_stream())
        with monkeypatch.context() as patch:
            strike = Strike(patch, where, name, number, late=late)
            try:
                one_step(captured)
            except SoftTimeLimitError:
                pass
            else:
                assert strike.calls < number, "it was swallowed"
        all_is_as_before(captured)
        assert set(dropped(captured)) <= {"interrupted", "times_unreadable"}


WHILE_IT_IS_RESOLVED = {
    "is it done": (SimulatedEvent, "query", 1),
    "its times": (Device, "read", 1),
    "the times of one that can't be read": (Device, "read", 2),
    "the packing": (resolver, "pack", 1),
    "the packing of the second packet": (resolver, "pack", 2),
    "the send": (Channel, "send", 1),
    "the send of the second packet": (Channel, "send", 2),
}


@pytest.mark.parametrize("late", [False, True], ids=["before it works", "after it"])
@pytest.mark.parametrize("call", WHILE_IT_IS_RESOLVED)
def test_while_steps_are_resolved_they_wait_or_are_counted(
    monkeypatch: pytest.MonkeyPatch, call: str, late: bool
) -> None:
    where, name, number = WHILE_IT_IS_RESOLVED[call]
    with capturing(Device(Clock())) as captured:
        thread = captured.recorder.local.thread
        thread.busy = True  # the idle thread leaves them alone
        for _ in range(6):
            one_step(captured)
        captured.clock.ns += 100 * MILLISECOND
        with monkeypatch.context() as patch:
            if "can't be read" in call:
                unreadable(patch)
            Strike(patch, where, name, number, late=late)
            with thread.lock, pytest.raises(SoftTimeLimitError):
                captured.recorder._resolver.resolve(thread, 96)
        thread.busy = False
        all_is_as_before(captured)
        arrived = told(captured)
        counts = dropped(captured)
        assert len({step.number for step in arrived}) == len(arrived)
        # What was being sent may have left all the same: then it is counted although it arrives, never the reverse.
        assert len(arrived) + counts.get("interrupted", 0) >= 6 * 2 + 2
        if "send" not in call:
            assert len(arrived) == 6 * 2 + 2
            assert "interrupted" not in counts


def unreadable(patch: pytest.MonkeyPatch) -> None:
    """Several events at once can't be read, so that each is tried alone."""
    read = Device.read

    def refuse(self: Device, device_index: int, pairs: Any) -> list[tuple[int, int]]:
        if len(pairs) > 1:
            raise OSError(507015, "the device says no")
        return read(self, device_index, pairs)

    patch.setattr(Device, "read", refuse)
