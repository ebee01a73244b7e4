"""Off means off; and on, off and on again."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import pytest

import otel_npu
from otel_npu.capture import switch
from tests.helpers.capturing import Captured, Clock, Exported, capturing, chosen, simulated

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.usefixtures("undecided")


class TestOff:
    def test_a_stage_is_one_shared_object_that_does_nothing(self) -> None:
        stage = otel_npu.stage("forward")
        assert otel_npu.stage("forward") is stage
        assert otel_npu.step("decode") is otel_npu.step("prefill")
        with stage, stage, otel_npu.step(), otel_npu.step():
            pass
        assert otel_npu.step().open().close() is None

    def test_exceptions_pass(self) -> None:
        with pytest.raises(KeyError), otel_npu.step(), otel_npu.stage("forward"):
            raise KeyError

    def test_there_is_nothing_to_flush(self) -> None:
        assert otel_npu.flush(0)
        otel_npu.disable()
        assert otel_npu.flush(0)

    def test_many_names_do_not_fill_the_memory(self) -> None:
        for number in range(5000):
            with otel_npu.stage(f"stage {number}"):
                pass
        assert len(switch._off_stages) <= 1024

    def test_no_thread_is_started_and_no_environment_changed(self, run_program: Callable[..., Any]) -> None:
        run_program(
            """
            import os, threading
            before = dict(os.environ)
            import otel_npu
            with otel_npu.step(), otel_npu.stage("forward"):
                pass
            assert threading.active_count() == 1
            assert dict(os.environ) == before
            """
        )

    def test_settings_that_say_so_do_not_enable(self) -> None:
        assert not otel_npu.enable(otel_npu.Settings(enabled=False))
        assert switch.current_recorder() is None


class TestTheEnvironment:
    def test_the_first_stage_or_step_enables(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("OTEL_NPU_ENABLED", "1")
        monkeypatch.setenv("OTEL_NPU_EXPORT", "inprocess")
        monkeypatch.setenv("OTEL_NPU_STEPS_PER_SECOND", "all")
        with capturing_by_environment() as captured:
            with otel_npu.stage("forward"):
                pass
            assert otel_npu.flush(20)
        assert len(captured.sent) >= 2  # and the hello

    def test_what_disable_has_said_stays(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("OTEL_NPU_ENABLED", "1")
        otel_npu.disable()
        with otel_npu.stage("forward"):
            pass
        assert switch.current_recorder() is None

    def test_it_is_read_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        otel_npu.stage("forward")
        monkeypatch.setenv("OTEL_NPU_ENABLED", "1")
        otel_npu.stage("forward")
        assert switch.current_recorder() is None

    def test_enable_does_not_ask_whether_it_is_enabled(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("OTEL_NPU_ENABLED", "0")
        monkeypatch.setenv("OTEL_NPU_EXPORT", "inprocess")
        assert otel_npu.enable()


class TestLater:
    def test_what_was_decorated_while_off_is_traced_once_on(self) -> None:
        @otel_npu.stage("plain")
        def plain() -> int:
            return 1

        @otel_npu.stage("with attributes", layer=1)
        def with_attributes() -> int:
            return 2

        @otel_npu.stage("coroutine")
        async def coroutine() -> int:
            return 3

        def call() -> list[int]:
            return [plain(), with_attributes(), asyncio.run(coroutine())]

        assert call() == [1, 2, 3]
        with capturing() as captured:
            assert call() == [1, 2, 3]
            stages = [step.stages[0] for step in captured.steps()]
        assert [(stage.name, stage.attributes) for stage in stages] == [
            ("plain", None),
            ("with attributes", {"layer": 1}),
            ("coroutine", None),
        ]
        assert call() == [1, 2, 3]

    def test_what_was_decorated_while_on_is_off_when_tracing_is(self) -> None:
        with capturing() as captured:

            @otel_npu.stage("forward")
            def forward() -> None:
                pass

            forward()
        forward()
        with capturing() as again:
            forward()
            assert len(again.steps()) == 1
        assert len([frame for frame in captured.sent if hasattr(frame, "stages")]) == 1

    def test_on_off_and_on_again(self, exported: Exported) -> None:
        exported.stage("first")
        exported.clock.ns += 10**12
        otel_npu.disable()
        exported.stage("while off")
        switch.enable_on(exported.device, chosen())
        exported.stage("second")
        assert set(exported.spans()) == {"first", "second"}
        first, second = exported.receiver.spans
        assert first.resource["service.instance.id"] != second.resource["service.instance.id"]

    def test_disable_exports_what_was_captured(self, exported: Exported) -> None:
        exported.stage("forward")
        exported.clock.ns += 10**12
        otel_npu.disable()
        assert [span.name for span in exported.receiver.spans] == ["forward"]

    def test_enabling_again_changes_nothing(self, captured: Captured) -> None:
        recorder = captured.recorder
        assert otel_npu.enable(otel_npu.Settings(device="cpu"))
        assert captured.recorder is recorder

    def test_a_stage_that_is_open_when_tracing_ends_does_no_harm(self) -> None:
        with capturing() as captured:
            with otel_npu.step(), otel_npu.stage("forward"):
                captured.device.launch(20)
                otel_npu.disable()
                with otel_npu.stage("off"):
                    pass
            with otel_npu.stage("off"):
                pass

    def test_a_fault_at_the_start_is_told_and_costs_only_tracing(
        self, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(switch, "Recorder", lambda *_: 1 / 0)
        assert not otel_npu.enable()
        with otel_npu.stage("forward"):
            pass
        assert "tracing could not start and is off" in caplog.text


class TestFlush:
    def test_says_whether_all_was_exported_in_time(self, exported: Exported) -> None:
        exported.stage("forward", 1000)
        assert not otel_npu.flush(0.05), "the device has not finished"
        exported.clock.ns += 10**12
        assert otel_npu.flush(20)
        assert [span.name for span in exported.receiver.spans] == ["forward"]

    def test_says_that_spans_were_refused(self, exported: Exported) -> None:
        exported.receiver.refuse = True
        exported.stage("forward")
        exported.clock.ns += 10**12
        assert not otel_npu.flush(20)

    def test_does_not_wait_for_an_open_step(self, exported: Exported) -> None:
        with otel_npu.step():
            exported.stage("forward")
            exported.clock.ns += 10**12
            assert otel_npu.flush(20)
            assert exported.receiver.spans == []
        assert set(exported.spans()) == {"worker_step", "forward"}


@contextlib.contextmanager
def capturing_by_environment() -> Any:
    """The reader of frames in the relay's place, while nothing has been enabled."""
    with capturing(simulated(Clock())) as captured:
        switch.turn_off(captured.recorder)
        switch._decided = False
        switch._off_stages.clear()
        yield captured
