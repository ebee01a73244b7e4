"""What a person sees of a request who opens its trace: nothing that looks missing, no noise, and whose clock it was."""

from __future__ import annotations

from typing import Any

import pytest

from otel_npu import semconv
from otel_npu.relay.requests import DETAIL_STEPS
from tests.helpers.built import stage
from tests.helpers.joined import MS, STEP_NS, Joined, attributes, host_stage, times


@pytest.fixture
def joined() -> Joined:
    return Joined()


def decode(joined: Joined, forward_ms: dict[int, int], steps: int, **request: Any) -> None:
    """A request with one step of prefill and so many of decode, each of 1 ms but for these."""
    joined.open(1, **request)
    joined.step(1, 1, prefill=True)
    for number in range(2, steps + 2):
        joined.schedule(number, {1: 1})
        forward_ns = forward_ms.get(number, 1) * MS
        joined.run(number, stages=[host_stage("forward", number * STEP_NS, forward_ns)])
        joined.update(number, {1: 1}, finished=[1] if number == steps + 1 else [])
    joined.end(1, steps + 1)


def below_decode(joined: Joined) -> list[tuple[str, tuple[float, float]]]:
    return [(span.name, times(span)) for span in joined.children(joined.only("decode"))]


def test_the_slowest_steps_of_a_decode_are_in_it_and_what_lies_between_them_says_how_many_it_stands_for(
    joined: Joined,
) -> None:
    decode(joined, {4: 7, 6: 9, 7: 8}, steps=10)
    assert below_decode(joined) == [
        ("other_steps", (20, 40)),
        ("decode_step", (40, 47)),
        ("other_steps", (47, 60)),
        ("decode_step", (60, 69)),
        ("decode_step", (70, 78)),
        ("other_steps", (78, 111)),
    ]
    others = [attributes(span) for span in joined.named("other_steps")]
    assert [said["npu.request.steps"] for said in others] == [2, 1, 4]
    assert [said["npu.request.device_time"] for said in others] == [0.002, 0.001, 0.004]
    assert joined.told()["other_steps"] == 7
    assert joined.told()["steps"] == 10


def test_a_step_that_is_shown_says_which_it_was_and_has_its_stages(joined: Joined) -> None:
    joined.open(1, 2)
    joined.step(1, 1, prefill=True)
    joined.schedule(2, {1: 1, 2: 30}, prefill={2}, total_tokens=40, total_requests=5)
    joined.run(2)
    joined.update(2, {1: 1, 2: 1})
    joined.step(3, 1, finished=[1])
    joined.end(1, 3)
    mixed, _ = joined.named("decode_step")
    assert attributes(mixed) == {
        "npu.step.number": 2,
        "npu.step.kind": "decode",
        "npu.step.tokens": 40,
        "npu.step.requests": 5,
        "npu.request.step_tokens": 1,
        "npu.rank": 0,
        "npu.timing": "host",
    }
    assert [span.name for span in joined.children(mixed)] == ["forward", "sample"]


def test_the_stages_of_a_phase_with_one_step_lie_right_below_it(joined: Joined) -> None:
    joined.open(1)
    joined.step(1, 1, prefill=True)
    joined.step(2, 1, finished=[1])
    joined.end(1, 2)
    for phase in ("prefill", "decode"):
        assert [span.name for span in joined.children(joined.only(phase))] == ["forward", "sample"]
    assert not joined.named("other_steps")
    assert "other_steps" not in joined.told()


def test_with_detail_every_step_has_a_span(joined: Joined) -> None:
    decode(joined, {}, steps=DETAIL_STEPS, detail=True)
    assert len(joined.named("decode_step")) == DETAIL_STEPS
    assert not joined.named("other_steps")


def test_with_detail_a_very_long_decode_shows_its_slowest_steps(joined: Joined) -> None:
    decode(joined, {300: 9}, steps=DETAIL_STEPS + 100, detail=True)
    assert len(joined.named("decode_step")) == DETAIL_STEPS
    assert (3000, 3009) in [times(span) for span in joined.named("decode_step")]
    assert joined.told()["other_steps"] == 100


def test_short_stages_that_the_host_alone_timed_are_left_out_of_a_request_and_summed_up(joined: Joined) -> None:
    begin = STEP_NS
    stages = [
        stage(name="forward", entered_ns=begin, exited_ns=begin + 1000, device_ns=begin, duration_ns=8 * MS),
        stage(name="eplb", entered_ns=begin + 1000, exited_ns=begin + 2000, device_ns=begin + 1000, duration_ns=3000),
        host_stage("bookkeep", begin + 8 * MS, MS // 10),
        host_stage("copy", begin + 8 * MS, MS // 20, parent=2),
        host_stage("model_runner_output", begin + 8 * MS + MS // 10, 8000),
        host_stage("wait", begin + 8 * MS + MS // 10, MS),
    ]
    joined.open(1)
    joined.schedule(1, {1: 9}, prefill=True)
    ran = joined.run(1, stages=stages)
    joined.update(1, {1: 1}, finished=[1])
    joined.end(1, 1)
    prefill = joined.only("prefill")
    assert [span.name for span in joined.children(prefill)] == ["forward", "eplb", "wait"]
    assert attributes(prefill)["npu.omitted_host_time"] == 0.000108
    assert len(ran) == len(stages) + 1  # the step's own trace has them all


def test_a_short_stage_of_the_host_stays_if_something_that_stays_is_in_it_or_it_failed(joined: Joined) -> None:
    begin = STEP_NS
    stages = [
        host_stage("forward", begin, 8 * MS),
        host_stage("outer", begin + 8 * MS, 2000),
        stage(name="inner", parent=1, entered_ns=begin, exited_ns=begin + 10, device_ns=begin, duration_ns=1000),
        host_stage("failed", begin + 8 * MS, 3000, error="ValueError"),
    ]
    joined.open(1)
    joined.schedule(1, {1: 9}, prefill=True)
    joined.run(1, stages=stages)
    joined.update(1, {1: 1}, finished=[1])
    joined.end(1, 1)
    assert [span.name for span in joined.children(joined.only("prefill"))] == ["forward", "outer", "failed"]
    assert "npu.omitted_host_time" not in attributes(joined.only("prefill"))


def test_every_span_of_a_request_says_whose_clock_it_was(joined: Joined) -> None:
    decode(joined, {}, steps=10)
    assert {attributes(span)["npu.timing"] for span in joined.spans} == {"host"}


def test_a_phase_is_timed_by_the_device_if_each_of_its_steps_is(joined: Joined) -> None:
    begin = STEP_NS
    timed = stage(name="forward", entered_ns=begin, exited_ns=begin + 10, device_ns=begin, duration_ns=MS)
    joined.open(1)
    joined.schedule(1, {1: 9}, prefill=True)
    joined.run(1, stages=[timed, host_stage("wait", begin, 9 * MS)])
    joined.update(1, {1: 1})
    joined.step(2, 1, finished=[1])
    joined.end(1, 2)
    timings = {name: attributes(joined.only(name))["npu.timing"] for name in ("queue", "prefill", "decode")}
    assert timings == {"queue": "host", "prefill": "device", "decode": "host"}
    assert joined.told("prefill")["device_time"] == 0.001


def test_a_request_has_the_id_that_its_client_got(joined: Joined) -> None:
    joined.open(1, request_id="cmpl-1-0", response_id="cmpl-1")
    joined.step(1, 1, prefill=True, finished=[1])
    joined.end(1, 1)
    for name in ("queue", "prefill"):
        said = attributes(joined.only(name))
        assert (said["gen_ai.request.id"], said["gen_ai.response.id"]) == ("cmpl-1-0", "cmpl-1")


def test_no_number_in_an_attribute_has_digits_that_mean_nothing(joined: Joined) -> None:
    odd_ns = 3_237_941
    joined.open(1, 2)
    for number in range(1, 8):
        joined.schedule(number, {1: 1, 2: 1}, total_tokens=3, total_requests=3)
        joined.run(number, stages=[host_stage("forward", number * STEP_NS, odd_ns)])
        joined.update(number, {1: 1, 2: 1}, finished=[1, 2] if number == 7 else [])
    joined.end(1, 7)
    joined.end(2, 7)
    said = [value for span in joined.spans for value in attributes(span).values() if isinstance(value, float)]
    assert said
    assert all(len(repr(value).partition(".")[2]) <= 9 for value in said), said


@pytest.mark.parametrize(
    ("nanoseconds", "seconds"), [(3_237_941, 0.003237941), (0, 0.0), (1, 1e-9), (2.6, 3e-9), (10**18, 1e9)]
)
def test_a_time_is_said_to_the_nanosecond(nanoseconds: float, seconds: float) -> None:
    assert semconv.seconds(nanoseconds) == seconds
