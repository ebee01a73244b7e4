"""`ProfileExecuteDuration` and its log line, for code and habits from vllm-ascend."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import pytest

import otel_npu
from otel_npu import ProfileExecuteDuration
from otel_npu.capture.records import Rank, new_step
from otel_npu.capture.steps import Step
from tests.helpers.capturing import MILLISECOND, SECOND, Captured, Exported, capturing, simulated

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    yield
    ProfileExecuteDuration()._captured.clear()


def capture(tracing: Captured | Exported, tag: str, milliseconds: float) -> None:
    with ProfileExecuteDuration().capture_async(tag):
        tracing.device.launch(round(milliseconds * MILLISECOND))


class WaitingClock:
    """Time passes for who waits: each look at the clock is a millisecond later than the one before."""

    def __init__(self) -> None:
        self.ns = 1000 * SECOND
        self.runs = False

    def __call__(self) -> int:
        self.ns += MILLISECOND if self.runs else 0
        return self.ns


class TestDurations:
    def test_there_is_one_object(self) -> None:
        assert ProfileExecuteDuration() is ProfileExecuteDuration()

    def test_what_was_captured_is_popped_once_in_milliseconds_by_tag(self, captured: Captured) -> None:
        capture(captured, "forward", 4.14)
        capture(captured, "post process", 14.17)
        captured.clock.ns += SECOND
        assert ProfileExecuteDuration().pop_captured_sync() == pytest.approx({"forward": 4.14, "post process": 14.17})
        assert ProfileExecuteDuration().pop_captured_sync() == {}

    def test_a_tag_captured_more_than_once_is_summed(self, captured: Captured) -> None:
        for milliseconds in (1, 2, 4):
            capture(captured, "forward", milliseconds)
        captured.clock.ns += SECOND
        assert ProfileExecuteDuration().pop_captured_sync() == pytest.approx({"forward": 7})

    @pytest.mark.parametrize("in_step", [True, False])
    def test_popping_waits_for_the_device_and_costs_the_span_nothing(self, in_step: bool) -> None:
        clock = WaitingClock()
        with capturing(simulated(clock)) as captured:  # type: ignore[arg-type]
            step = otel_npu.step("decode").open() if in_step else None
            capture(captured, "forward", 8)
            clock.runs = True
            assert ProfileExecuteDuration().pop_captured_sync() == pytest.approx({"forward": 8})
            clock.runs = False
            capture(captured, "sample", 3)
            clock.ns += SECOND
            if step is not None:
                step.close()
            assert ProfileExecuteDuration().pop_captured_sync() == pytest.approx({"sample": 3})
            stages = [stage for step in captured.steps() for stage in step.stages]
        assert [(stage.name, stage.duration_ns // MILLISECOND) for stage in stages] == [("forward", 8), ("sample", 3)]
        assert None not in [stage.device_ns for stage in stages]

    def test_a_pair_that_was_read_early_is_not_read_again(self, captured: Captured) -> None:
        """Reading twice is wrong where the first reading moves the event that times are counted from."""
        read = captured.device.read
        times_read: list[int] = []

        def counting(device_index: int, pairs: Any) -> list[tuple[int, int]]:
            times_read.append(len(pairs))
            return read(device_index, pairs)

        captured.device.read = counting  # type: ignore[method-assign,assignment]
        with otel_npu.step():
            capture(captured, "forward", 5)
            captured.clock.ns += SECOND
            ProfileExecuteDuration().pop_captured_sync()
            captured.stage("sample")
        step = captured.step()
        assert times_read == [1, 1]
        assert [stage.duration_ns for stage in step.stages] == [5 * MILLISECOND, MILLISECOND]

    def test_what_has_been_resolved_is_popped_all_the_same(self, captured: Captured) -> None:
        capture(captured, "forward", 5)
        captured.finish()
        assert ProfileExecuteDuration().pop_captured_sync() == pytest.approx({"forward": 5})

    def test_what_is_captured_is_a_stage_and_exported(self, exported: Exported) -> None:
        with otel_npu.step():
            capture(exported, "forward", 5)
        spans = exported.spans()
        assert set(spans) == {"worker_step", "forward"}
        assert spans["forward"].duration_ns == 5 * MILLISECOND

    def test_an_exception_passes_and_marks_the_stage(self, captured: Captured) -> None:
        with pytest.raises(KeyError), ProfileExecuteDuration().capture_async("forward"):
            raise KeyError
        captured.clock.ns += SECOND
        assert set(ProfileExecuteDuration().pop_captured_sync()) == {"forward"}
        assert captured.step().stages[0].error == "KeyError"

    def test_while_off_nothing_is_captured(self) -> None:
        with ProfileExecuteDuration().capture_async("forward"):
            pass
        assert ProfileExecuteDuration().pop_captured_sync() == {}

    def test_who_never_pops_does_not_fill_the_memory(self, captured: Captured) -> None:
        for _ in range(3000):
            capture(captured, "forward", 0.001)
            captured.clock.ns += MILLISECOND
        assert len(ProfileExecuteDuration()._captured) == 1024

    def test_unreadable_times_are_host_times_and_counted_once(self, captured: Captured) -> None:
        def failing(*_: object) -> list[tuple[int, int]]:
            raise OSError

        captured.device.read = failing  # type: ignore[method-assign,assignment]
        capture(captured, "forward", 5000)
        captured.clock.ns += 3600 * SECOND
        assert 0 < ProfileExecuteDuration().pop_captured_sync()["forward"] < 5000
        assert captured.step().stages[0].device_ns is None
        assert captured.dropped() == {"times_unreadable": 1}


class TestLogLine:
    @pytest.fixture
    def logged(self, caplog: pytest.LogCaptureFixture) -> Iterator[Captured]:
        with caplog.at_level(logging.INFO, "otel_npu"), capturing(log_stages=True) as captured:
            yield captured

    @staticmethod
    def lines(captured: Captured, caplog: pytest.LogCaptureFixture) -> list[str]:
        captured.finish()
        return [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]

    def test_is_what_vllm_ascend_printed_for_a_worker(self, logged: Captured, caplog: pytest.LogCaptureFixture) -> None:
        step = new_step(Step, logged.recorder, "decode", (), None, None, Rank(0, returns_output=True)).open()
        logged.stage("forward", 4_140_000)
        logged.stage("post process", 14_170_000)
        step.close()
        assert self.lines(logged, caplog) == [
            "Profile execute duration [Decode]: [post process]:14.17ms [forward]:4.14ms"
        ]

    def test_has_a_line_for_each_step_in_order_and_sums_a_tag(
        self, logged: Captured, caplog: pytest.LogCaptureFixture
    ) -> None:
        with otel_npu.step("prefill"):
            logged.stage("forward", 1_000_000)
            logged.stage("forward", 500_000)
            logged.stage("nothing", 0)
        with otel_npu.step():
            logged.stage("forward", 10_000)
        otel_npu.step("empty").open().close()
        logged.stage("alone")
        assert self.lines(logged, caplog) == [
            "Profile execute duration [Prefill]: [forward]:1.50ms [nothing]:0.00ms",
            "Profile execute duration [Step]: [forward]:0.01ms",
        ]

    def test_is_seen_without_logging_set_up(self, run_program: Callable[..., Any]) -> None:
        done = run_program(
            """
            import otel_npu
            with otel_npu.step("decode"), otel_npu.stage("forward"):
                pass
            assert otel_npu.flush(20)
            """,
            {
                "OTEL_NPU_ENABLED": "1",
                "OTEL_NPU_LOG_STAGES": "1",
                "OTEL_NPU_DEVICE": "cpu",
                "OTEL_NPU_EXPORT": "inprocess",
                "OTEL_TRACES_EXPORTER": "none",
            },
        )
        *_, line = done.stderr.splitlines()  # after the one that says that tracing is on
        assert "[otel_npu] Profile execute duration [Decode]: [forward]:0." in line
