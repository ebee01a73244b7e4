"""Which steps become traces, under which parent, and what they are linked to."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON

import otel_npu
from otel_npu.capture import switch
from otel_npu.capture.context import Limiter
from otel_npu.settings import Settings
from tests.helpers.capturing import SECOND, Captured, Clock, Exported, capturing

if TYPE_CHECKING:
    from collections.abc import Iterator

    from otel_npu.wire import frames

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{SPAN}-01"


@pytest.fixture
def tracer() -> Iterator[trace.Tracer]:
    provider = TracerProvider(sampler=ALWAYS_ON, shutdown_on_exit=False)
    yield provider.get_tracer("test")
    provider.shutdown()


@pytest.fixture
def unsampling_tracer() -> Iterator[trace.Tracer]:
    provider = TracerProvider(sampler=ALWAYS_OFF, shutdown_on_exit=False)
    yield provider.get_tracer("test")
    provider.shutdown()


def ids(span: trace.Span) -> tuple[str, str]:
    span_context = span.get_span_context()
    return trace.format_trace_id(span_context.trace_id), trace.format_span_id(span_context.span_id)


def kept(steps: list[frames.Step]) -> list[str]:
    """The kinds of the steps that are traces."""
    return [step.kind for step in steps if step.kept]


class TestTheActiveSpan:
    def test_is_the_parent_of_a_step(self, exported: Exported, tracer: trace.Tracer) -> None:
        with tracer.start_as_current_span("request") as request, otel_npu.step():
            exported.stage("forward")
        step = exported.spans()["worker_step"]
        assert (step.trace_id, step.parent_span_id) == ids(request)

    def test_is_the_parent_of_a_stage_outside_any_step(self, exported: Exported, tracer: trace.Tracer) -> None:
        with tracer.start_as_current_span("request") as request:
            exported.stage("forward")
        forward = exported.spans()["forward"]
        assert (forward.trace_id, forward.parent_span_id) == ids(request)

    def test_is_looked_at_when_the_step_opens(self, captured: Captured, tracer: trace.Tracer) -> None:
        with otel_npu.step(), tracer.start_as_current_span("later"):
            captured.stage("forward")
        assert captured.step().parent_span_id == b""

    def test_if_it_is_not_sampled_there_is_no_trace(self, exported: Exported, unsampling_tracer: trace.Tracer) -> None:
        with unsampling_tracer.start_as_current_span("request"):
            with otel_npu.step("unsampled"):
                exported.stage("forward")
                with otel_npu.step("inside"):
                    exported.stage("inside")
            exported.stage("alone")
        exported.stage("after")
        assert set(exported.spans()) == {"after"}

    def test_that_fails_is_no_parent_and_no_harm(self, captured: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(trace, "get_current_span", lambda: 1 / 0)
        captured.stage("forward")
        step = captured.step()
        assert step.trace_id
        assert not step.parent_span_id


class TestIds:
    def test_are_not_repeated_by_a_seed_of_the_programs(self, captured: Captured) -> None:
        import random

        for _ in range(2):
            random.seed(0)
            captured.stage("forward")
        first, second = captured.steps()
        assert first.trace_id != second.trace_id
        assert first.span_id != second.span_id
        assert (len(first.trace_id), len(first.span_id)) == (16, 8)


class TestLinks:
    def test_a_step_is_linked_to_each_of_its_requests(self, exported: Exported, tracer: trace.Tracer) -> None:
        span = tracer.start_span("request")
        other = tracer.start_span("another")
        with otel_npu.step("decode", requests=[TRACEPARENT, span, other.get_span_context()]):
            exported.stage("forward")
        spans = exported.spans()
        assert spans["worker_step"].links == [(TRACE, SPAN), ids(span), ids(other)]
        assert spans["forward"].links == []

    def test_links_beyond_opentelemetrys_default_limit_are_kept(self, exported: Exported) -> None:
        requests = [f"00-{TRACE}-{number:016x}-01" for number in range(1, 1001)]
        with otel_npu.step("decode", requests=requests):
            pass
        assert len(exported.spans()["worker_step"].links) == 1000

    def test_a_request_that_is_not_sampled_is_not_linked(
        self, captured: Captured, unsampling_tracer: trace.Tracer
    ) -> None:
        with otel_npu.step(requests=[TRACEPARENT[:-2] + "00", unsampling_tracer.start_span("request")]):
            pass
        assert captured.step().links == []
        assert captured.dropped() == {}

    def test_a_later_version_of_the_traceparent_may_say_more(self, captured: Captured) -> None:
        with otel_npu.step(requests=[f"01-{TRACE}-{SPAN}-01-more", f" {TRACEPARENT} ", TRACEPARENT.encode()]):
            pass
        assert [link.hex() for link in captured.step().links] == [TRACE + SPAN + "01"] * 3

    def test_whatever_else_is_left_out_and_counted(self, captured: Captured) -> None:
        class Hostile:
            def get_span_context(self) -> Any:
                raise RuntimeError("a secret")

        bad = [
            "",
            "a request id",
            TRACEPARENT.upper(),
            f"00-{'0' * 32}-{SPAN}-01",
            f"00-{TRACE}-{'0' * 16}-01",
            f"ff-{TRACE}-{SPAN}-01",
            f"00-{TRACE}-{SPAN}-01-more",
            f"00-{TRACE}-{SPAN}-01-",
            b"\xff\xfe",
            None,
            7,
            object(),
            Hostile(),
            trace.INVALID_SPAN,
        ]
        with otel_npu.step(requests=[*bad, TRACEPARENT]):
            pass
        step = captured.step()
        assert [link.hex() for link in step.links] == [TRACE + SPAN + "01"]
        assert captured.dropped() == {"bad_link": len(bad)}

    def test_a_step_that_is_no_trace_does_not_look_at_them(self) -> None:
        with capturing(steps_per_second=0) as captured:
            with otel_npu.step(requests=["bad"]):
                pass
            assert captured.step().links == []
            assert captured.dropped() == {}


class TestRate:
    def test_so_many_steps_a_second_are_kept_of_each_kind(self) -> None:
        clock = Clock()
        limiter = Limiter(2, clock)
        kept: Counter[str] = Counter()
        for tenth in range(100):
            for kind in ("prefill", "decode"):
                kept[kind] += sum(limiter.allow(kind) for _ in range(10))
            if tenth == 0:
                assert kept == {"prefill": 2, "decode": 2}
            clock.ns += SECOND // 10
        assert kept == {"prefill": 21, "decode": 21}

    def test_a_rate_below_one_keeps_one_in_so_many_seconds(self) -> None:
        clock = Clock()
        limiter = Limiter(0.5, clock)
        seconds = []
        for second in range(7):
            if limiter.allow("decode"):
                seconds.append(second)
            clock.ns += SECOND
        assert seconds == [0, 2, 4, 6]

    def test_a_pause_saves_up_no_more_than_one_second(self) -> None:
        clock = Clock()
        limiter = Limiter(5, clock)
        clock.ns += 1000 * SECOND
        assert sum(limiter.allow("decode") for _ in range(100)) == 5

    def test_many_kinds_share_one_allowance(self) -> None:
        limiter = Limiter(1, Clock())
        assert sum(limiter.allow(f"{kind}") for kind in range(1000)) == 65

    def test_all_keeps_every_step(self, captured: Captured) -> None:
        for _ in range(50):
            otel_npu.step("decode").open().close()
        assert kept(captured.steps()) == ["decode"] * 50

    def test_0_keeps_none_but_all_are_measured(self) -> None:
        with capturing(steps_per_second=0) as captured:
            for _ in range(3):
                with otel_npu.step("decode"):
                    captured.stage("forward", SECOND)
            captured.stage("alone")
            steps = captured.steps()
            assert kept(steps) == []
            assert [step.stages[0].duration_ns for step in steps[:3]] == [SECOND] * 3

    def test_the_rate_is_that_of_the_settings(self) -> None:
        with capturing(steps_per_second=0.001) as captured:
            for kind in ("prefill", "decode", "decode", "prefill"):
                with otel_npu.step(kind):
                    captured.stage("forward")
            captured.stage("alone")
            captured.stage("alone")
            assert kept(captured.steps()) == ["prefill", "decode", "alone"]

    def test_a_step_inside_a_step_is_kept_with_it(self) -> None:
        with capturing(steps_per_second=0.001) as captured:
            for _ in range(2):
                with otel_npu.step("outer"):
                    for _ in range(3):
                        otel_npu.step("inner").open().close()
            assert kept(captured.steps()) == ["inner"] * 3 + ["outer"]


class TestSamplers:
    @pytest.fixture(autouse=True)
    def where_spans_go(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("OTEL_NPU_EXPORT", "inprocess")
        monkeypatch.setenv("OTEL_NPU_STEPS_PER_SECOND", "all")
        monkeypatch.setenv("OTEL_NPU_DEVICE", "simulated")

    @pytest.mark.parametrize(
        ("sampler", "roots", "under_sampled"),
        [
            ("always_on", True, True),
            ("parentbased_always_on", True, True),
            ("traceidratio", True, True),
            ("ALWAYS_OFF", False, False),
            ("parentbased_always_off", False, True),
        ],
    )
    def test_what_the_programs_sampler_leaves_of_steps(
        self, sampler: str, roots: bool, under_sampled: bool, tracer: trace.Tracer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("OTEL_TRACES_SAMPLER", sampler)
        settings = Settings.from_environment()
        with capturing(steps_per_second=settings.steps_per_second, root_traces=settings.root_traces) as captured:
            otel_npu.step("root").open().close()
            with tracer.start_as_current_span("request"):
                otel_npu.step("child").open().close()
            expected = ["root"] * roots + ["child"] * under_sampled
            assert kept(captured.steps()) == expected

    @pytest.mark.usefixtures("undecided")
    @pytest.mark.parametrize("value", ["true", "TRUE", " True "])
    def test_nothing_is_captured_where_the_sdk_is_disabled(self, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("OTEL_SDK_DISABLED", value)
        monkeypatch.setenv("OTEL_NPU_ENABLED", "1")
        assert otel_npu.stage("forward") is otel_npu.stage("forward")
        assert not otel_npu.enable()
        assert not otel_npu.enable(Settings(steps_per_second=math.inf))
        assert switch.current_recorder() is None

    @pytest.mark.parametrize("value", ["1", "yes", "false", ""])
    def test_nothing_but_true_disables_it(self, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("OTEL_SDK_DISABLED", value)
        assert otel_npu.enable()
