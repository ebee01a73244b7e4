"""Stages and steps as they are captured: what arrives of them, once, and how it nests."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import threading
from typing import TYPE_CHECKING, Any

import pytest

import otel_npu
from otel_npu.capture.records import Handle
from otel_npu.capture.resolver import _done
from otel_npu.capture.stages import Stage
from otel_npu.capture.steps import MAX_DEPTH
from otel_npu.drops import Drops
from otel_npu.wire import frames
from otel_npu.wire.frames import MAX_STAGES
from tests.helpers.capturing import MILLISECOND, SECOND, Captured, Clock, Exported, capturing, simulated, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable


def done(step: Any) -> bool:
    return _done(step, set(), Drops())


def names(step: frames.Step) -> list[str]:
    return [stage.name for stage in step.stages]


def parents(step: frames.Step) -> dict[str, str | None]:
    """Each stage's parent by name; the names of a test's stages are all different."""
    return {stage.name: step.stages[stage.parent].name if stage.parent >= 0 else None for stage in step.stages}


def durations(step: frames.Step) -> dict[str, int]:
    return {stage.name: stage.duration_ns for stage in step.stages}


def on_device(step: frames.Step) -> list[bool]:
    return [stage.device_ns is not None for stage in step.stages]


def in_threads(*bodies: Callable[[], None]) -> None:
    threads = [threading.Thread(target=body) for body in bodies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


LIES: dict[str, Any] = {"npu.step.kind": "lie", "npu.step.stages": 99}


class TestSpans:
    def test_stages_arrive_under_their_step_with_the_devices_durations(self, exported: Exported) -> None:
        with otel_npu.step("decode", batch=3):
            exported.stage("prepare_input", 120_000)
            exported.stage("forward", 7 * MILLISECOND, layers=[1, 2], model="m")
            exported.stage("sample", 20)
        spans = exported.spans()
        assert set(spans) == {"worker_step", "prepare_input", "forward", "sample"}
        step = spans.pop("worker_step")
        assert {span.parent_span_id for span in spans.values()} == {step.span_id}
        assert {span.trace_id for span in spans.values()} == {step.trace_id}
        assert {name: span.duration_ns for name, span in spans.items()} == {
            "prepare_input": 120_000,
            "forward": 7 * MILLISECOND,
            "sample": 20,
        }
        assert step.parent_span_id == ""
        assert step.start_ns == min(span.start_ns for span in spans.values())
        assert step.end_ns == max(span.end_ns for span in spans.values())
        assert step.attributes == {
            "npu.step.number": 1,
            "npu.step.kind": "decode",
            "npu.step.stages": 3,
            "npu.timing": "device",
            "npu.sampled.reason": "rate",
            "batch": 3,
        }
        forward = spans["forward"].attributes
        assert (forward["layers"], forward["model"]) == ([1, 2], "m")
        assert (forward["npu.timing"], forward["npu.device.index"], forward["npu.stream.id"]) == ("device", 0, 0)
        assert 0 <= forward["npu.host.duration"] < 20
        assert {span.scope for span in (step, *spans.values())} == {"otel_npu"}
        assert step.resource["npu.device.type"] == "simulated"

    def test_a_stage_inside_another_is_its_child(self, exported: Exported) -> None:
        with otel_npu.step():
            with otel_npu.stage("outer"):
                exported.stage("inner", 2 * MILLISECOND)
                exported.device.launch(MILLISECOND)
            exported.stage("after")
        spans = exported.spans()
        assert spans["inner"].parent_span_id == spans["outer"].span_id
        assert spans["outer"].parent_span_id == spans["worker_step"].span_id
        assert spans["after"].parent_span_id == spans["worker_step"].span_id
        assert spans["outer"].duration_ns == 3 * MILLISECOND
        assert spans["inner"].start_ns == spans["outer"].start_ns

    def test_a_stage_on_another_stream_may_outlast_the_one_around_it(self, exported: Exported) -> None:
        device = exported.device
        side = device.new_stream()
        with otel_npu.step(), otel_npu.stage("forward"):
            device.use(side)
            exported.stage("copy", 9 * MILLISECOND)
            device.use(device.default_stream)
            device.launch(MILLISECOND)
        spans = exported.spans()
        assert spans["copy"].parent_span_id == spans["forward"].span_id
        assert (spans["forward"].duration_ns, spans["copy"].duration_ns) == (MILLISECOND, 9 * MILLISECOND)
        assert spans["worker_step"].end_ns == spans["copy"].end_ns

    def test_what_the_program_says_never_hides_what_was_measured(self, exported: Exported) -> None:
        with otel_npu.step("decode", **LIES):
            exported.stage("forward", **{"npu.timing": "lie", "npu.host.duration": -1.0, "own": True})
        spans = exported.spans()
        assert spans["worker_step"].attributes["npu.step.kind"] == "decode"
        assert spans["worker_step"].attributes["npu.step.stages"] == 1
        assert spans["forward"].attributes["npu.timing"] == "device"
        assert spans["forward"].attributes["npu.host.duration"] >= 0
        assert spans["forward"].attributes["own"] is True

    def test_a_stage_outside_any_step_is_a_trace_of_its_own(self, exported: Exported) -> None:
        with otel_npu.stage("alone"):
            exported.stage("inside")
        exported.stage("another")
        spans = exported.spans()
        assert set(spans) == {"alone", "inside", "another"}
        assert spans["alone"].parent_span_id == spans["another"].parent_span_id == ""
        assert spans["inside"].parent_span_id == spans["alone"].span_id
        assert spans["alone"].trace_id == spans["inside"].trace_id != spans["another"].trace_id

    def test_a_step_inside_a_stage_outside_any_step_is_a_child_of_that_stage(self, exported: Exported) -> None:
        with otel_npu.stage("request"), otel_npu.step("decode"):
            exported.stage("forward")
        spans = exported.spans()
        assert spans["worker_step"].parent_span_id == spans["request"].span_id
        assert spans["forward"].parent_span_id == spans["worker_step"].span_id
        assert {span.trace_id for span in spans.values()} == {spans["request"].trace_id}

    def test_a_step_inside_a_step_is_its_child(self, exported: Exported) -> None:
        with otel_npu.step("outer"):
            exported.stage("first")
            with otel_npu.step("inner"):
                exported.stage("second")
            exported.stage("third")
        exported.finish()
        steps = {span.attributes["npu.step.kind"]: span for span in exported.receiver.named("worker_step")}
        of = {span.name: span.parent_span_id for span in exported.receiver.spans if span.name != "worker_step"}
        outer, inner = steps["outer"].span_id, steps["inner"].span_id
        assert steps["inner"].parent_span_id == outer
        assert of == {"first": outer, "second": inner, "third": outer}

    def test_drop_counts_are_on_the_next_step_span(self, exported: Exported) -> None:
        exported.stage("alone", bad=object(), worse={})
        with otel_npu.step():
            exported.stage("forward")
        spans = exported.spans()
        assert spans["worker_step"].attributes["npu.dropped.bad_attribute"] == 2
        assert not [key for key in spans["alone"].attributes if key.startswith("npu.dropped.")]
        with otel_npu.step():
            exported.stage("later")
        exported.finish()
        last = exported.receiver.named("worker_step")[-1]
        assert not [key for key in last.attributes if key.startswith("npu.dropped.")], "each drop is told once"


class TestExceptions:
    SECRET = "the prompt of a user"

    def test_it_is_raised_and_marks_stage_and_step_by_its_type_alone(self, exported: Exported) -> None:
        error = ValueError(self.SECRET)
        with pytest.raises(ValueError) as raised, otel_npu.step(), otel_npu.stage("forward"):
            raise error
        assert raised.value is error
        spans = exported.spans()
        for span in spans.values():
            assert (span.status, span.attributes["error.type"]) == (2, "ValueError")
        assert self.SECRET not in repr(exported.receiver.spans)

    def test_its_message_never_leaves_the_process(self, captured: Captured) -> None:
        with pytest.raises(KeyError), otel_npu.step(), otel_npu.stage("forward"):
            raise KeyError(self.SECRET)
        step = captured.step()
        assert (step.error, step.stages[0].error) == ("KeyError", "KeyError")
        assert self.SECRET.encode() not in frames.encode(step)

    def test_one_that_is_caught_inside_marks_only_what_it_left(self, captured: Captured) -> None:
        with (
            otel_npu.step(),
            otel_npu.stage("outer"),
            pytest.raises(ZeroDivisionError),
            otel_npu.stage("inner"),
        ):
            1 / 0  # noqa: B018
        step = captured.step()
        assert step.error is None
        assert {stage.name: stage.error for stage in step.stages} == {"outer": None, "inner": "ZeroDivisionError"}

    def test_a_stage_that_raises_is_still_measured(self, captured: Captured) -> None:
        def launch() -> None:
            captured.device.launch(3 * MILLISECOND)
            raise RuntimeError

        with pytest.raises(RuntimeError), otel_npu.step(), otel_npu.stage("forward"):
            launch()
        assert durations(captured.step()) == {"forward": 3 * MILLISECOND}


class Unprintable:
    """Like a tensor on a device: to print it waits for the device."""

    def __str__(self) -> str:
        raise AssertionError("printed")

    __repr__ = __format__ = __str__  # type: ignore[assignment]

    def __bool__(self) -> bool:
        raise AssertionError("asked for its truth")

    def __len__(self) -> int:
        raise AssertionError("asked for its length")


class Floating(float):
    """As numpy.float64 is one: a float, and not what an encoder expects."""


class Counting(int):
    pass


class Text(str):
    __slots__ = ()


class TestAttributes:
    def test_strings_numbers_flags_and_lists_of_one_of_these_are_kept(self, captured: Captured) -> None:
        values: dict[str, Any] = {"a": "text", "b": 1, "c": 2.5, "d": True}
        values |= {"e": ["x", "y"], "f": [1, 2], "g": [], "h": [False]}
        with otel_npu.step(**values):
            captured.stage("forward", **values)
        step = captured.step()
        assert step.attributes == step.stages[0].attributes == values
        assert captured.dropped() == {}

    @pytest.mark.parametrize(
        "bad",
        [None, object(), Unprintable(), {}, [1, "a"], [[1]], [None], {1}, b"bytes", 1 << 63, "\ud800", ["\ud800"]],
        ids=lambda bad: type(bad).__name__,
    )
    def test_anything_else_is_left_out_and_counted_and_never_printed(self, captured: Captured, bad: object) -> None:
        with otel_npu.step(bad=bad, good=1):
            captured.stage("forward", bad=bad, good=2)
        step = captured.step()
        assert step.attributes == {"good": 1}
        assert step.stages[0].attributes == {"good": 2}
        assert captured.dropped() == {"bad_attribute": 2}

    @pytest.mark.parametrize("value", [Floating(1.5), Counting(7), Text("text"), [Floating(1.5)], (1, 2)])
    def test_what_is_derived_from_them_is_kept_as_the_plain_value(self, captured: Captured, value: Any) -> None:
        captured.stage("forward", value=value)
        (stage,) = captured.step().stages
        assert stage.attributes == {"value": list(value) if isinstance(value, list | tuple) else value}

    def test_long_text_is_cut(self, captured: Captured) -> None:
        captured.stage("forward", text="x" * 100_000)
        (stage,) = captured.step().stages
        assert stage.attributes == {"text": "x" * 4096}

    def test_an_attribute_may_have_the_name_of_a_parameter(self, captured: Captured) -> None:
        with otel_npu.step("decode", kind="k", name="n"):
            captured.stage("forward", name="n", self="s")
        step = captured.step()
        assert (step.kind, step.attributes) == ("decode", {"kind": "k", "name": "n"})
        assert step.stages[0].attributes == {"name": "n", "self": "s"}


class TestNesting:
    def test_a_stages_parent_is_the_one_around_it(self, captured: Captured) -> None:
        with otel_npu.step(), otel_npu.stage("a"):
            with otel_npu.stage("b"):
                captured.stage("c")
                captured.stage("d")
            captured.stage("e")
        assert parents(captured.step()) == {"a": None, "b": "a", "c": "b", "d": "b", "e": "a"}

    def test_a_stage_that_is_still_open_when_its_step_closes_arrives_when_it_ends(self, captured: Captured) -> None:
        step = otel_npu.step().open()
        stage = otel_npu.stage("late")
        stage.__enter__()
        captured.stage("early")
        step.close()
        captured.stage("outside")
        assert [names(step) for step in captured.sent if isinstance(step, frames.Step)] == []
        captured.device.launch(5 * MILLISECOND)
        stage.__exit__(None, None, None)
        steps = captured.steps()
        assert [names(step) for step in steps] == [["late", "early"], ["outside"]]
        assert durations(steps[0])["late"] == 7 * MILLISECOND
        assert steps[0].stages[0].exited_ns > steps[0].closed_ns

    def test_tasks_that_overlap_on_one_thread_are_not_in_one_another(self, captured: Captured) -> None:
        async def task(name: str, enter: asyncio.Event, entered: asyncio.Event, leave: asyncio.Event) -> None:
            await enter.wait()
            with otel_npu.stage(name):
                captured.device.launch(MILLISECOND)
                entered.set()
                await leave.wait()

        async def run() -> None:
            first_entered, second_entered, go = asyncio.Event(), asyncio.Event(), asyncio.Event()
            go.set()
            first_left = asyncio.Event()
            first = asyncio.ensure_future(task("first", go, first_entered, second_entered))
            second = asyncio.ensure_future(task("second", first_entered, second_entered, first_left))
            await first
            captured.device.launch(3 * MILLISECOND)
            first_left.set()
            await second

        with otel_npu.step():
            asyncio.run(run())
        step = captured.step()
        assert parents(step) == {"first": None, "second": None}
        assert durations(step) == {"first": 2 * MILLISECOND, "second": 4 * MILLISECOND}

    def test_steps_inside_steps_that_are_too_deep_are_left_out_and_their_stages_go_to_the_one_around(
        self, captured: Captured
    ) -> None:
        steps = [otel_npu.step(f"{depth}").open() for depth in range(MAX_DEPTH + 2)]
        captured.stage("deepest")
        for step in reversed(steps):
            step.close()
        captured.stage("outside")
        arrived = captured.steps()
        assert len(arrived) == MAX_DEPTH + 1
        assert (arrived[0].kind, names(arrived[0])) == (str(MAX_DEPTH - 1), ["deepest"])
        assert arrived[-1].bare
        assert captured.dropped() == {"step_too_deep": 2}

    def test_steps_that_close_out_of_order_leave_nothing_behind(self, captured: Captured) -> None:
        outermost = otel_npu.step("outermost").open()
        first = otel_npu.step("first").open()
        second = otel_npu.step("second").open()
        first.close()
        captured.stage("in second")
        second.close()
        captured.stage("in outermost")
        outermost.close()
        captured.stage("outside")
        steps = captured.steps()
        assert {step.kind: names(step) for step in steps} == {
            "first": [],
            "second": ["in second"],
            "outermost": ["in outermost"],
            "outside": ["outside"],
        }

    def test_steps_that_overlap_without_end_stay_as_deep_as_they_are(self, captured: Captured) -> None:
        earlier = otel_npu.step().open()
        for _ in range(3 * MAX_DEPTH):
            later = otel_npu.step().open()
            earlier.close()
            earlier = later
        earlier.close()
        assert len(captured.steps()) == 3 * MAX_DEPTH + 1
        assert captured.dropped() == {}


class TestOpenAndClose:
    def test_a_step_can_be_opened_and_closed_by_two_calls(self, captured: Captured) -> None:
        step = otel_npu.step("decode").open()
        captured.stage("forward")
        captured.stage("sample")
        step.close()
        captured.stage("outside")
        steps = captured.steps()
        assert [(step.kind, step.bare, names(step)) for step in steps] == [
            ("decode", False, ["forward", "sample"]),
            ("outside", True, ["outside"]),
        ]

    def test_it_says_with_which_error(self, captured: Captured) -> None:
        otel_npu.step().open().close(TimeoutError)
        assert captured.step().error == "TimeoutError"

    def test_it_can_be_closed_by_another_thread(self, captured: Captured) -> None:
        step = otel_npu.step().open()
        captured.stage("forward")
        in_threads(step.close)
        captured.stage("outside")
        assert [names(step) for step in captured.steps()] == [["forward"], ["outside"]]

    def test_closing_again_or_before_opening_does_nothing(self, captured: Captured) -> None:
        step = otel_npu.step("decode")
        step.close()
        step.open()
        step.close()
        step.close()
        assert captured.step().kind == "decode"

    def test_a_step_without_stages_arrives_with_host_times(self, exported: Exported) -> None:
        with otel_npu.step("idle"):
            pass
        span = exported.spans()["worker_step"]
        assert span.attributes["npu.step.stages"] == 0
        assert 0 < span.duration_ns < 20 * SECOND

    def test_a_step_object_serves_once(self, captured: Captured) -> None:
        step = otel_npu.step("decode")
        with step:
            captured.stage("forward")
        with step:
            captured.stage("outside")
        assert [names(step) for step in captured.steps()] == [["forward"], ["outside"]]
        assert captured.dropped() == {"reentered": 1}

    def test_numbers_count_the_steps(self, captured: Captured) -> None:
        for _ in range(3):
            otel_npu.step().open().close()
        assert [step.number for step in captured.steps()] == [1, 2, 3]


class TestOneObjectUsedOften:
    def test_each_use_of_a_stage_object_arrives(self, captured: Captured) -> None:
        stage = otel_npu.stage("forward", layer=1)
        with otel_npu.step():
            for milliseconds in (1, 2):
                with stage:
                    captured.device.launch(milliseconds * MILLISECOND)
        with otel_npu.step(), stage:
            captured.device.launch(3 * MILLISECOND)
        captured.finish()
        with otel_npu.step(), stage:
            captured.device.launch(4 * MILLISECOND)
        steps = captured.steps()
        assert [[stage.duration_ns // MILLISECOND for stage in step.stages] for step in steps] == [[1, 2], [3], [4]]
        assert {stage.name for step in steps for stage in step.stages} == {"forward"}
        assert captured.dropped() == {}

    @pytest.mark.parametrize("in_step", [True, False])
    @pytest.mark.parametrize("times", [2, 3, 4])
    def test_entered_again_while_open_it_is_measured_once(self, captured: Captured, in_step: bool, times: int) -> None:
        stage = otel_npu.stage("recursive")

        def recurse(depth: int) -> None:
            with stage:
                captured.device.launch(MILLISECOND)
                if depth > 1:
                    recurse(depth - 1)
                captured.device.launch(MILLISECOND)

        if in_step:
            with otel_npu.step():
                recurse(times)
        else:
            recurse(times)
        captured.stage("after")
        steps = captured.steps()
        assert [durations(step) for step in steps] == [
            {"recursive": 2 * times * MILLISECOND},
            {"after": MILLISECOND},
        ]
        assert captured.dropped() == {"reentered": times - 1}
        with stage:
            captured.device.launch(MILLISECOND)
        assert durations(captured.steps()[-1]) == {"recursive": MILLISECOND}

    def test_two_threads_can_share_a_decorated_function(self, captured: Captured) -> None:
        together = threading.Barrier(2)

        @otel_npu.stage("shared")
        def work() -> None:
            together.wait(20)
            captured.device.launch(MILLISECOND)
            together.wait(20)

        in_threads(work, work)
        assert [names(step) for step in captured.steps()] == [["shared"], ["shared"]]


class TestDecorator:
    def test_each_call_of_a_function_is_a_stage(self, captured: Captured) -> None:
        @otel_npu.stage("forward", layer=3)
        def forward(x: int, *, y: int) -> int:
            """What it does."""
            captured.device.launch(x * MILLISECOND)
            return x + y

        with otel_npu.step():
            assert forward(1, y=2) == 3
            assert forward(2, y=2) == 4
        step = captured.step()
        assert [(stage.name, stage.duration_ns, stage.attributes) for stage in step.stages] == [
            ("forward", MILLISECOND, {"layer": 3}),
            ("forward", 2 * MILLISECOND, {"layer": 3}),
        ]
        assert (forward.__name__, forward.__doc__) == ("forward", "What it does.")

    def test_it_may_call_itself(self, captured: Captured) -> None:
        @otel_npu.stage("recursive")
        def recurse(depth: int) -> None:
            captured.device.launch(MILLISECOND)
            if depth > 1:
                recurse(depth - 1)

        with otel_npu.step():
            recurse(3)
        step = captured.step()
        assert [(stage.parent, stage.duration_ns) for stage in step.stages] == [
            (-1, 3 * MILLISECOND),
            (0, 2 * MILLISECOND),
            (1, MILLISECOND),
        ]

    def test_each_call_of_a_coroutine_function_is_a_stage_that_lasts_until_it_returns(self, captured: Captured) -> None:
        @otel_npu.stage("forward")
        async def forward() -> str:
            captured.device.launch(MILLISECOND)
            await asyncio.sleep(0)
            captured.device.launch(MILLISECOND)
            return "done"

        assert inspect.iscoroutinefunction(forward)
        with otel_npu.step():
            assert asyncio.run(forward()) == "done"
        assert durations(captured.step()) == {"forward": 2 * MILLISECOND}

    def test_an_exception_of_the_function_passes_and_marks_its_stage(self, captured: Captured) -> None:
        @otel_npu.stage("forward")
        def forward() -> None:
            raise LookupError

        with pytest.raises(LookupError):
            forward()
        assert captured.step().stages[0].error == "LookupError"


class TestThreadsAndStreams:
    def test_each_thread_has_steps_of_its_own(self, captured: Captured) -> None:
        together = threading.Barrier(4)

        def work(kind: str) -> None:
            with otel_npu.step(kind):
                together.wait(20)
                for index in range(5):
                    captured.stage(f"{kind}{index}")
                together.wait(20)

        in_threads(*(lambda kind=kind: work(kind) for kind in "abcd"))
        steps = captured.steps()
        assert {step.kind: names(step) for step in steps} == {kind: [f"{kind}{i}" for i in range(5)] for kind in "abcd"}
        assert len({step.number for step in steps}) == 4

    def test_what_a_thread_leaves_behind_arrives_after_its_end(self, captured: Captured) -> None:
        in_threads(lambda: captured.stage("forward"))
        assert names(captured.step()) == ["forward"]

    def test_a_stage_is_measured_on_the_stream_on_which_it_was_entered(self, captured: Captured) -> None:
        device, side = captured.device, captured.device.new_stream()
        with otel_npu.step(), otel_npu.stage("default"):
            device.launch(MILLISECOND)
            device.use(side)
            captured.stage("side", 5 * MILLISECOND)
        (step,) = captured.steps()
        assert durations(step) == {"default": MILLISECOND, "side": 5 * MILLISECOND}
        assert {stage.name: stage.stream_id for stage in step.stages} == {"default": 0, "side": side.stream_id}

    @pytest.mark.parametrize("nested", [False, True], ids=["in one step", "by way of a step inside"])
    def test_a_step_waits_for_each_of_its_streams(self, captured: Captured, nested: bool) -> None:
        device, side = captured.device, captured.device.new_stream()
        with otel_npu.step("both"):
            captured.stage("long", 50 * MILLISECOND)
            device.use(side)
            if nested:
                with otel_npu.step("inner"):
                    captured.stage("in inner")
            captured.stage("short")
        thread = captured.recorder.local.thread
        (both,) = [step for step in thread.pending if step.kind == "both"]
        captured.clock.ns += 10 * MILLISECOND
        assert not done(both)
        captured.clock.ns += 40 * MILLISECOND
        assert done(both)

    def test_devices_have_pools_of_their_own(self, captured: Captured) -> None:
        device, other = captured.device, captured.device.new_stream(device_index=1)
        asked: list[tuple[int, int]] = []
        read = device.read

        def reading(device_index: int, pairs: Any) -> list[tuple[int, int]]:
            assert {pair.pool.device_index for pair in pairs} == {device_index}
            asked.append((device_index, len(pairs)))
            return read(device_index, pairs)

        device.read = reading  # type: ignore[method-assign,assignment]
        with otel_npu.step():
            captured.stage("zero", MILLISECOND)
            with otel_npu.step():
                device.use(other)
                captured.stage("one", 2 * MILLISECOND)
            captured.stage("one too", 3 * MILLISECOND)
        steps = captured.steps()
        measured = {
            stage.name: (stage.device_index, stage.duration_ns // MILLISECOND)
            for step in steps
            for stage in step.stages
        }
        assert measured == {"zero": (0, 1), "one": (1, 2), "one too": (1, 3)}
        assert sorted(asked) == [(0, 1), (1, 1), (1, 1)]

    def test_pairs_return_to_their_pool(self, captured: Captured) -> None:
        device, other = captured.device, captured.device.new_stream(device_index=1)
        for stream in [device.default_stream, other] * 50:
            device.use(stream)
            captured.stage("forward")
            captured.finish()
        pools = captured.device.pools.values()
        assert [len(pool.pairs) for pool in pools] == [1, 1]
        assert [len(pool.free) for pool in pools] == [1, 1]


class TestFaultsOfOurs:
    @pytest.mark.parametrize("look_up", ["current_stream_key", "capturing", "current_stream"])
    def test_a_look_up_that_fails_costs_the_stage_and_not_the_program(
        self, captured: Captured, monkeypatch: pytest.MonkeyPatch, look_up: str
    ) -> None:
        device, side = captured.device, captured.device.new_stream()

        def fail() -> None:
            raise RuntimeError("the device is lost")

        with otel_npu.step("decode"):
            captured.stage("before")
            device.use(side)
            with monkeypatch.context() as failing:
                failing.setattr(captured.recorder if look_up == "current_stream_key" else device, look_up, fail)
                ran = []
                with otel_npu.stage("during"):
                    ran.append(True)
            captured.stage("after")
        assert ran == [True]
        captured.finish()
        assert [stage.name for stage in captured.step().stages] == ["before", "after"]
        assert captured.dropped() == {"internal_error": 1}


class TestLeftOut:
    def test_a_stage_on_a_stream_in_capture_is_left_out_and_counted(self, captured: Captured) -> None:
        device, side = captured.device, captured.device.new_stream()
        device.use(side)
        with otel_npu.step("decode"):
            captured.stage("before")
            side.capturing = True
            with otel_npu.stage("captured"):
                captured.stage("captured inside")
            side.capturing = False
            captured.stage("after", 3 * MILLISECOND)
        step = captured.step()
        assert durations(step) == {"before": MILLISECOND, "after": 3 * MILLISECOND}
        assert captured.dropped() == {"stream_captured": 2}

    def test_outside_any_step_too(self, captured: Captured) -> None:
        device, side = captured.device, captured.device.new_stream()
        device.use(side)
        side.capturing = True
        captured.stage("captured")
        side.capturing = False
        captured.stage("after")
        assert [names(step) for step in captured.steps()] == [["after"]]
        assert captured.dropped() == {"stream_captured": 1}

    @pytest.mark.parametrize("resolved", [False, True])
    def test_a_stage_object_that_was_used_before_keeps_what_it_measured(
        self, captured: Captured, resolved: bool
    ) -> None:
        device, side = captured.device, captured.device.new_stream()
        device.use(side)
        stage = otel_npu.stage("forward")
        with stage:
            device.launch(MILLISECOND)
        if resolved:
            captured.finish()
        side.capturing = True
        with stage:
            device.launch(5 * MILLISECOND)
        side.capturing = False
        assert [durations(step) for step in captured.steps()] == [{"forward": MILLISECOND}]
        assert captured.dropped() == {"stream_captured": 1}

    def test_one_that_was_left_out_stays_out_when_it_is_entered_again_inside(self, captured: Captured) -> None:
        device, side = captured.device, captured.device.new_stream()
        stage = otel_npu.stage("forward")
        device.use(side)
        side.capturing = True
        with stage:
            device.use(device.default_stream)
            with stage:
                device.launch(MILLISECOND)
            captured.finish()
        assert captured.steps() == []
        with stage:
            device.launch(MILLISECOND)
        assert durations(captured.step()) == {"forward": MILLISECOND}

    def test_without_a_free_event_pair_the_host_times_it_and_nothing_waits(self) -> None:
        device = simulated(Clock())
        device.pool_pairs = 3
        with capturing(device) as captured:
            with otel_npu.step():
                for index in range(5):
                    captured.stage(f"{index}", MILLISECOND)
            assert captured.clock() == 1000 * SECOND, "the device has done nothing yet"
            step = captured.step()
            assert on_device(step) == [True, True, True, False, False]
            assert all(0 <= stage.duration_ns < 20 * SECOND for stage in step.stages[3:])
            assert captured.dropped() == {"pool_exhausted": 2}
            with otel_npu.step():
                captured.stage("later", 7 * MILLISECOND)
            assert durations(captured.steps()[-1]) == {"later": 7 * MILLISECOND}

    def test_what_only_the_host_timed_keeps_its_host_time_inside_what_the_device_timed(
        self, exported: Exported
    ) -> None:
        exported.device.pool_pairs = 1
        exported.device.launch(3600 * SECOND)
        with otel_npu.step(), otel_npu.stage("outer"), otel_npu.stage("inner"):
            assert sum(range(100_000))
        span = exported.spans()["inner (host)"]
        assert span.attributes["npu.timing"] == "host"
        assert span.duration_ns == pytest.approx(span.attributes["npu.host.duration"] * 1e9, abs=1)

    def test_stages_beyond_what_one_step_holds_are_left_out(self, captured: Captured) -> None:
        with otel_npu.step():
            for index in range(MAX_STAGES + 10):
                captured.stage(f"{index}", 20)
        captured.finish()
        captured.stage("outside")
        step, outside = captured.steps()
        assert names(step) == [f"{index}" for index in range(MAX_STAGES)]
        assert all(on_device(step))
        assert names(outside) == ["outside"]
        assert captured.dropped() == {"step_too_large": 10}

    @pytest.mark.parametrize(
        ("stages", "characters"), [(300, 40), (1000, 40), (1000, 100), (100, 1500), (40, 4000)], ids=str
    )
    def test_a_step_too_large_for_a_packet_loses_its_largest_attributes(
        self, captured: Captured, stages: int, characters: int
    ) -> None:
        with otel_npu.step("before"):
            captured.stage("forward")
        with otel_npu.step("large", label="kept"):
            for index in range(stages):
                captured.stage(f"layers.{index}.self_attn", 20, layer=index, module="m" * characters)
        with otel_npu.step("after"):
            captured.stage("forward")
        _, large, _ = captured.steps()
        assert names(large) == [f"layers.{index}.self_attn" for index in range(stages)]
        assert large.attributes == {"label": "kept"}
        assert [(stage.attributes or {}).get("layer") for stage in large.stages] == list(range(stages))
        left_out = [stage for stage in large.stages if "module" not in (stage.attributes or {})]
        assert captured.dropped() == ({"attribute_too_large": len(left_out)} if left_out else {})

    def test_names_too_long_for_a_packet_are_cut(self, captured: Captured) -> None:
        with otel_npu.step("large"):
            for _ in range(1000):
                captured.stage("forward" * 100)
        (large,) = captured.steps()
        assert {stage.name[:20] for stage in large.stages} == {("forward" * 100)[:20]}

    def test_steps_that_the_device_never_finishes_do_not_fill_the_memory(self, captured: Captured) -> None:
        for _ in range(1100):
            captured.stage("forward")
        assert len(captured.recorder.local.thread.pending) == 1000
        assert len(captured.steps(lost=True)) == 1000
        assert captured.dropped()["backlog_full"] == 100


class TestFaults:
    """What a device does wrong costs measurements, never the program."""

    def test_a_failing_query_costs_that_step_its_device_times(
        self, captured: Captured, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from otel_npu.devices.simulated import SimulatedEvent

        query, failures = SimulatedEvent.query, [OSError("the query failed")]

        def failing(event: SimulatedEvent) -> bool:
            if failures:
                raise failures.pop()
            return query(event)

        monkeypatch.setattr(SimulatedEvent, "query", failing)
        with otel_npu.step():
            captured.stage("forward", 5 * SECOND)
        captured.finish()
        with otel_npu.step():
            captured.stage("forward", 5 * SECOND)
        first, second = captured.steps()
        assert on_device(first) == [False]
        assert first.stages[0].duration_ns < 5 * SECOND
        assert (on_device(second), durations(second)) == ([True], {"forward": 5 * SECOND})
        assert captured.dropped() == {"times_unreadable": 1}

    def test_an_unreadable_pair_costs_only_its_own_stage(self, captured: Captured) -> None:
        read = captured.device.read
        bad: list[Any] = []

        def failing(device_index: int, pairs: Any) -> list[tuple[int, int]]:
            bad[:] = bad or [pairs[1]]
            if bad[0] in pairs:
                raise OSError("can't be read")
            return read(device_index, pairs)

        captured.device.read = failing  # type: ignore[method-assign,assignment]
        with otel_npu.step():
            for name in "abc":
                captured.stage(name)
        captured.finish()
        captured.device.read = read  # type: ignore[method-assign]
        with otel_npu.step():
            captured.stage("d")
        first, second = captured.steps()
        assert (on_device(first), on_device(second)) == ([True, False, True], [True])
        assert captured.dropped() == {"times_unreadable": 1}

    @pytest.mark.parametrize("time", [(SECOND, -20), ((1 << 64) * 1000, SECOND), (-(1 << 63), 0), (SECOND, 1 << 63)])
    def test_what_can_be_no_time_costs_the_time_and_not_the_step(
        self, captured: Captured, time: tuple[int, int]
    ) -> None:
        """An end before its start was recorded into a graph; a clock that shows -1 has 2^64 - 1 microseconds."""
        captured.device.read = lambda _, pairs: [time for _ in pairs]  # type: ignore[method-assign,assignment]
        captured.stage("forward")
        assert on_device(captured.step()) == [False]
        assert captured.dropped() == {"times_unreadable": 1}

    def test_a_fault_of_our_own_costs_one_step_and_does_not_come_out_of_flush(self, captured: Captured) -> None:
        captured.stage("before")
        with otel_npu.step("bad"):
            captured.stage("forward")
        captured.stage("later")
        captured.recorder.local.thread.pending[1].rank = object()  # can't be encoded
        captured.finish(lost=True)
        assert [names(step) for step in captured.steps()] == [["before"], ["later"]]
        assert captured.dropped() == {"internal_error": 1}


class RefusedError(RuntimeError):
    """The device's error code of a launch of the model's."""


class TestErrorsOutOfRecord:
    """torch_npu hands the error of a failed launch to whoever enqueues next: it is the model's."""

    @pytest.mark.parametrize("in_step", [True, False])
    @pytest.mark.parametrize("at", ["entry", "exit"])
    def test_it_reaches_the_caller_unchanged_and_tracing_is_off(
        self, captured: Captured, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
        at: str, in_step: bool,
    ) -> None:  # fmt: skip
        from otel_npu.devices.simulated import SimulatedEvent

        with otel_npu.step("before"):
            captured.stage("before")
        record, error = SimulatedEvent.record, RefusedError("507015")
        left = [0 if at == "entry" else 1]

        def failing(event: SimulatedEvent, stream: Any) -> None:
            if threading.current_thread() is threading.main_thread():  # the idle thread pings
                if not left[0]:
                    raise error
                left[0] -= 1
            record(event, stream)

        recorder = captured.recorder
        monkeypatch.setattr(SimulatedEvent, "record", failing)
        captured.device.pool_pairs += 1  # so that a new pair is made, with a record that fails
        captured.device.pools[0].free.clear()
        ran = []
        step = otel_npu.step("broken") if in_step else contextlib.nullcontext()
        with pytest.raises(RefusedError) as raised, step, otel_npu.stage("forward"):
            ran.append("body")
        assert raised.value is error
        assert raised.value.__context__ is None
        assert ran == ([] if at == "entry" else ["body"])
        assert otel_npu.stage("off") is otel_npu.stage("off"), "tracing is off"
        assert len(caplog.records) == 1
        assert "tracing is off" in caplog.text
        captured.clock.ns += 3600 * SECOND
        assert recorder.flush(20), "nothing is left behind that would wait for ever"
        sent = {step.kind: step for step in captured.sent if isinstance(step, frames.Step)}
        assert names(sent["before"]) == ["before"]
        if in_step:
            assert sent["broken"].error == "RefusedError"

    def test_tracing_can_be_turned_on_again(self, captured: Captured) -> None:
        captured.recorder.stop_for_the_models_error()
        assert otel_npu.enable(otel_npu.Settings(export="inprocess"))
        assert isinstance(otel_npu.stage("forward"), Stage)
        assert isinstance(otel_npu.step(), Handle)


def test_while_the_device_is_behind_nothing_waits_and_later_all_arrives(captured: Captured) -> None:
    for _ in range(100):
        with otel_npu.step():
            captured.stage("forward", SECOND)
    assert captured.clock() == 1000 * SECOND
    assert not otel_npu.flush(0.01), "the device has not finished"
    steps = captured.steps()
    assert [durations(step) for step in steps] == [{"forward": SECOND}] * 100
    assert [step.number for step in steps] == list(range(1, 101))


def test_the_idle_thread_resolves_when_no_step_comes(captured: Captured) -> None:
    captured.stage("forward")
    captured.clock.ns += SECOND
    wait_until(lambda: captured.sent)


@pytest.mark.slow
def test_memory_and_events_stay_as_they_are_over_a_million_stages(run_program: Callable[..., Any]) -> None:
    done = run_program(
        """
        import os
        import otel_npu
        from otel_npu.capture import switch

        def resident_kib():
            with open("/proc/self/statm") as file:
                return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024

        assert otel_npu.enable(otel_npu.Settings(device="simulated", export="relay", hang_seconds=3600))
        def run(steps):
            for _ in range(steps // 500):
                for _ in range(500):
                    with otel_npu.step("decode"):
                        for _ in range(100):
                            with otel_npu.stage("forward", layer=1):
                                pass
                assert otel_npu.flush(60)  # a busy machine's relay must not fall behind for megabytes

        run(2_000)
        before = resident_kib()
        run(8_000)
        pool = switch.current_recorder().device.pools[0]
        print(resident_kib() - before, len(pool.pairs))
        """,
        {"OTEL_TRACES_EXPORTER": "none"},
        timeout=300,
    )
    grown_kib, pairs = map(int, done.stdout.split())
    assert grown_kib < 4096
    assert pairs <= 1024


class TestRaces:
    def test_a_stage_whose_end_is_being_recorded_is_not_resolved_yet(self, captured: Captured) -> None:
        """Nor is its bare step, which another stage has closed: the idle thread may come at any moment."""
        recorder = captured.recorder
        outer, inner = otel_npu.stage("outer"), otel_npu.stage("inner")
        outer.__enter__()
        inner.__enter__()
        captured.device.launch(MILLISECOND)
        outer.__exit__(None, None, None)
        assert isinstance(inner, Stage)
        assert inner.pair is not None
        record_end = inner.pair.record_end

        def meanwhile(stream: Any) -> None:
            captured.clock.ns += SECOND
            recorder.idle.resolve_for(recorder.local.thread)
            record_end(stream)

        inner.pair.record_end = meanwhile
        inner.__exit__(None, None, None)
        durations = {stage.name: stage.duration_ns for stage in captured.step().stages}
        assert durations["outer"] == MILLISECOND
        assert durations["inner"] >= SECOND

    def test_a_flush_does_not_wait_longer_than_it_may_for_another(self, captured: Captured) -> None:
        holding, done = threading.Event(), threading.Event()

        def hold() -> None:  # as another thread's flush(3600) would
            with captured.recorder._flush_lock:
                holding.set()
                done.wait(20)

        def look() -> None:
            holding.wait(20)
            assert not otel_npu.flush(0.01)
            done.set()

        in_threads(hold, look)

    def test_a_step_that_outlives_tracing_gives_its_events_back(self) -> None:
        device = simulated(Clock())
        for _ in range(3):
            with capturing(device):
                step = otel_npu.step("decode").open()
                with otel_npu.stage("forward"):
                    pass
            otel_npu.disable()
            step.close()
        pool = device.pools[0]
        assert len(pool.pairs) == len(pool.free) == 1

    def test_more_links_than_a_frame_holds_are_cut_and_counted(self, captured: Captured) -> None:
        traceparent = f"00-{'1' * 32}-{'2' * 16}-01"
        with otel_npu.step("decode", requests=[traceparent] * 5000):
            captured.stage("forward")
        assert len(captured.step().links) == 4096
        assert captured.dropped() == {"too_many_links": 904}
