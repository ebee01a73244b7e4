"""The hang watch: the stage in which an NPU is stuck is named while it is."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest

import otel_npu
from otel_npu.capture import context, hang, switch
from otel_npu.capture.records import Rank, new_step
from otel_npu.capture.steps import Step
from otel_npu.devices.simulated import SimulatedEvent
from otel_npu.wire import frames
from tests.helpers.capturing import SECOND, Captured, Clock, Exported, capturing, chosen, simulated, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.helpers.receiver import Receiver

HANG_SECONDS = 0.2


@pytest.fixture
def watched() -> Iterator[Captured]:
    with capturing(hang_seconds=HANG_SECONDS) as captured:
        yield captured


@pytest.fixture
def exported(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> Exported:
    for variable, value in receiver.grpc_environment.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    clock = Clock()
    tracing = Exported(simulated(clock), clock, receiver)
    switch.enable_on(tracing.device, chosen(hang_seconds=HANG_SECONDS))
    return tracing


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_a_stage_that_the_device_does_not_finish_is_reported_while_it_hangs(
    exported: Exported, caplog: pytest.LogCaptureFixture
) -> None:
    with otel_npu.step("decode"):
        exported.stage("prepare_input", 20)
        exported.clock.ns += 20
        exported.stage("forward", 1000 * SECOND)
        exported.stage("sample")
    (report,) = exported.receiver.wait_for(1, "unfinished_stage")
    assert len(exported.receiver.spans) == 1
    assert report.status == 2
    assert report.status_message.startswith("stage 'forward' has been unfinished for ")
    assert report.attributes["npu.stage.name"] == "forward"
    assert report.attributes["npu.step.number"] == 1
    assert report.attributes["npu.step.kind"] == "decode"
    assert report.attributes["npu.unfinished.duration"] >= HANG_SECONDS
    assert report.duration_ns == pytest.approx(report.attributes["npu.unfinished.duration"] * 1e9, abs=1000)
    (line,) = lines(caplog)
    assert line.startswith("stage 'forward' of step 1 (decode) has been unfinished for ")

    exported.finish()
    spans = {span.name: span for span in exported.receiver.spans}
    assert set(spans) == {"unfinished_stage", "worker_step", "prepare_input", "forward", "sample"}
    assert report.trace_id == spans["worker_step"].trace_id
    assert report.parent_span_id == spans["worker_step"].span_id
    assert lines(caplog)[1].startswith("step 1 (decode) has finished after all, ")
    assert len(lines(caplog)) == 2


def test_it_is_reported_once(watched: Captured, caplog: pytest.LogCaptureFixture) -> None:
    watched.stage("forward", 1000 * SECOND)
    wait_until(watched.unfinished)
    thread = watched.recorder.local.thread
    with thread.lock:
        hang.watch(thread, chosen(hang_seconds=1e-9), watched.recorder.drops, watched.recorder.send)
    assert len(watched.unfinished()) == len(lines(caplog)) == 1


def test_a_step_that_was_not_kept_is_kept_when_it_hangs(caplog: pytest.LogCaptureFixture) -> None:
    with capturing(hang_seconds=HANG_SECONDS, steps_per_second=0) as captured:
        with otel_npu.step("decode"):
            captured.stage("forward", 1000 * SECOND)
        wait_until(captured.unfinished)
        (report,) = captured.unfinished()
        step = captured.step()
        assert report.trace_id == step.trace_id != b""
        assert report.parent_span_id == step.span_id != b""


def test_a_stage_in_which_the_host_is_stuck_is_reported_too(watched: Captured) -> None:
    with otel_npu.step("decode"), otel_npu.stage("outer"):
        watched.stage("done")
        watched.clock.ns += SECOND
        with otel_npu.stage("stuck"):
            wait_until(watched.unfinished)
    assert [report.name for report in watched.unfinished()] == ["stuck"]


def test_a_stage_outside_any_step_is_reported_in_its_own_trace(watched: Captured) -> None:
    watched.stage("forward", 1000 * SECOND)
    wait_until(watched.unfinished)
    (report,) = watched.unfinished()
    assert report.parent_span_id == b""
    assert watched.step().trace_id == report.trace_id


def test_it_is_reported_while_the_program_waits_for_it(watched: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    finished = threading.Event()
    monkeypatch.setattr(SimulatedEvent, "synchronize", lambda _: finished.wait(20))
    with otel_npu.ProfileExecuteDuration().capture_async("forward"):
        watched.device.launch(1000 * SECOND)
    popped: list[dict[str, float]] = []
    waiting = threading.Thread(target=lambda: popped.append(otel_npu.ProfileExecuteDuration().pop_captured_sync()))
    waiting.start()
    wait_until(watched.unfinished)
    watched.clock.ns += 1000 * SECOND
    finished.set()
    waiting.join()
    assert popped == [{"forward": 1_000_000.0}]


def test_a_stage_whose_exit_never_comes_does_not_hold_up_what_follows(
    watched: Captured, caplog: pytest.LogCaptureFixture
) -> None:
    step = otel_npu.step("abandoned").open()
    abandoned = otel_npu.stage("abandoned")
    abandoned.__enter__()
    step.close()
    with otel_npu.step("later"):
        watched.stage("forward")
    watched.clock.ns += SECOND
    wait_until(lambda: len([frame for frame in list(watched.sent) if isinstance(frame, frames.Step)]) == 2)
    assert [report.name for report in watched.unfinished()] == ["abandoned"]
    assert not [line for line in lines(caplog) if "finished after all" in line]
    abandoned.__exit__(None, None, None)
    assert [step.kind for step in watched.steps()] == ["abandoned", "later"]
    assert watched.dropped() == {"times_unreadable": 1}


def test_what_is_only_slow_is_not_reported(captured: Captured) -> None:
    thread = captured.recorder.local.thread
    captured.stage("forward", 1000 * SECOND)
    with thread.lock:
        hang.watch(thread, chosen(hang_seconds=3600), captured.recorder.drops, captured.recorder.send)
    captured.finish()
    assert captured.unfinished() == []


def test_never_means_never() -> None:
    with capturing(hang_seconds=float("inf")) as captured:
        captured.stage("forward", 1000 * SECOND)
        thread = captured.recorder.local.thread
        with thread.lock:
            hang.watch(thread, captured.recorder.settings, captured.recorder.drops, captured.recorder.send)
        captured.finish()
        assert captured.unfinished() == []


def test_where_no_trace_may_begin_it_is_a_line_and_counted_but_no_span(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """`OTEL_TRACES_SAMPLER=always_off`."""
    with capturing(root_traces=False, hang_seconds=3600) as captured:
        captured.stage("forward", 1000 * SECOND)
        thread = captured.recorder.local.thread
        with thread.lock:
            hang.watch(
                thread,
                chosen(root_traces=False, hang_seconds=1e-9),
                captured.recorder.drops,
                captured.recorder.send,
            )
        assert len(lines(caplog)) == 1
        captured.clock.ns += 2000 * SECOND
        captured.finish()
        (report,) = captured.unfinished()
        assert (report.trace_id, report.span_id) == (b"", b"")


def test_a_hanging_step_of_an_engine_tells_which_it_is(watched: Captured) -> None:
    ids = context.Ids(b"T" * 16, b"S" * 8, b"E" * 8, kept=False)
    step = new_step(Step, watched.recorder, "decode", (), None, ids, Rank(1, returns_output=False)).open()
    watched.stage("forward", 1000 * SECOND)
    step.close()
    wait_until(watched.unfinished)
    (report,) = watched.unfinished()
    assert (report.trace_id, report.parent_span_id, report.rank) == (b"T" * 16, b"S" * 8, 1)
    assert (report.span_id, report.engine_span_id) == (b"S" * 8, b"E" * 8)
    told = watched.step()
    assert (told.trace_id, told.parent_span_id) == (b"T" * 16, b"E" * 8)
