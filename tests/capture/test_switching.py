"""Capture off and on from outside, while the program runs."""

from __future__ import annotations

import gc
import os
import threading
from typing import TYPE_CHECKING, Any

import otel_npu
from otel_npu.capture import switch
from otel_npu.capture.off import OffStage, OffStep
from otel_npu.wire import frames
from tests.helpers.capturing import MILLISECOND, capturing, wait_until

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable

    from tests.helpers.capturing import Captured


def tell(captured: Captured, *, on: bool) -> None:
    """Somebody at the relay wants it; returns once the relay has the answer."""
    told = answers(captured)
    assert captured.relay is not None
    captured.relay.send(frames.encode(frames.Switch(on)))
    wait_until(lambda: len(answers(captured)) > len(told))


def answers(captured: Captured) -> list[bool]:
    return [frame.on for frame in list(captured.sent) if isinstance(frame, frames.Switched)]


def test_off_stages_are_what_they_are_when_off_from_the_start_and_on_there_are_steps_again(captured: Captured) -> None:
    tell(captured, on=False)
    assert type(otel_npu.stage("forward")) is OffStage
    assert type(otel_npu.step("decode")) is OffStep
    tell(captured, on=True)
    with otel_npu.step("decode"):
        captured.stage("forward")
    assert [stage.name for stage in captured.step().stages] == ["forward"]
    assert answers(captured) == [False, True]


def test_a_step_under_way_ends_with_all_that_was_in_it(captured: Captured) -> None:
    with otel_npu.step("decode"):
        captured.stage("forward", MILLISECOND)
        with otel_npu.stage("sample"):
            recorder = captured.recorder
            tell(captured, on=False)
    captured.clock.ns += 10**12
    assert otel_npu.flush(60)
    (step,) = [frame for frame in captured.sent if isinstance(frame, frames.Step)]
    assert [stage.name for stage in step.stages] == ["forward", "sample"]
    assert not any(thread.open or thread.pending for thread in recorder.threads)


def test_500_times_back_and_forth_leave_nothing_behind(captured: Captured) -> None:
    def back_and_forth(times: int) -> list[int]:
        for _ in range(times):
            recorder.obey(on=False)
            recorder.obey(on=True)
            with otel_npu.step("decode"):
                captured.stage("forward")
        captured.finish()
        gc.collect()
        return [threading.active_count(), len(os.listdir("/proc/self/fd")), len(recorder.threads)]  # noqa: PTH208

    recorder = captured.recorder
    before = back_and_forth(20)
    after = back_and_forth(500)
    assert all(count <= at_first for count, at_first in zip(after, before, strict=True)), (before, after)
    assert len([frame for frame in captured.sent if isinstance(frame, frames.Step)]) == 520


def test_it_is_not_turned_on_by_the_program_but_by_whoever_turned_it_off(captured: Captured) -> None:
    tell(captured, on=False)
    assert otel_npu.enable() is False
    assert type(otel_npu.stage("forward")) is OffStage


def test_what_the_model_has_ended_is_not_turned_on_again(captured: Captured) -> None:
    captured.recorder.stop_capture()
    assert captured.relay is not None
    tell(captured, on=True)
    assert answers(captured) == [False]
    assert switch.current_recorder() is None


def test_a_program_that_turns_tracing_off_while_it_is_off_ends_it(captured: Captured) -> None:
    recorder = captured.recorder
    tell(captured, on=False)
    otel_npu.disable()
    assert not recorder.running
    recorder.obey(on=True)
    assert switch.current_recorder() is None


def test_an_answer_to_a_flush_is_not_lost_beside_a_switch(captured: Captured) -> None:
    assert captured.relay is not None
    for number in range(50):
        captured.relay.send(frames.encode(frames.Switch(True)))
        assert otel_npu.flush(60), number
    wait_until(lambda: len(answers(captured)) > 0)


def test_standby_captures_nothing_but_says_who_it_is() -> None:
    with capturing(standby=True) as captured:
        assert type(otel_npu.stage("forward")) is OffStage
        wait_until(lambda: len(captured.sent) > 1)
        first: Any = captured.sent[0]
        assert isinstance(first, frames.Hello)
        assert first.on is False
        tell(captured, on=True)
        assert type(otel_npu.stage("forward")) is not OffStage


def test_a_forked_child_is_off_where_its_parent_is(
    run_program: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    source = """
        import os

        import otel_npu
        from otel_npu.capture import switch

        assert type(otel_npu.stage("forward")).__name__ == "OffStage"
        if not os.fork():
            ok = type(otel_npu.stage("forward")).__name__ == "OffStage" and switch._switched_off is not None
            os._exit(0 if ok else 1)
        assert os.wait()[1] == 0
    """
    environment = {"OTEL_NPU_ENABLED": "standby", "OTEL_NPU_DEVICE": "simulated", "OTEL_TRACES_EXPORTER": "none"}
    done = run_program(source, environment)
    assert "stands by" in done.stderr
