"""A request's spans: where its time went, by what its engine, the rank with the output and its front end say."""

from __future__ import annotations

import gc
import random
import re
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.trace import SpanKind

from otel_npu import semconv
from otel_npu.relay import joiner
from otel_npu.relay.engine_step import EngineStep, StepTimes
from otel_npu.relay.requests import RECENT_STEPS, SHOWN_PREFILL_STEPS, OpenRequest, Phase
from tests.helpers import built
from tests.helpers.built import stage
from tests.helpers.joined import (
    MS,
    UNIX_NS,
    Joined,
    attributes,
    host_stage,
    id_of,
    parent_id,
    span_id,
    times,
    trace_id,
)

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture
def joined() -> Joined:
    return Joined()


def names(joined: Joined) -> list[str]:
    """Of all spans but the engine's steps."""
    return [span.name for span in joined.spans if span.name != "engine_step"]


def ms(seconds: float) -> float:
    return round(seconds * 1e3, 6)


# The trace of a request


def test_a_request_is_its_queue_its_prefill_and_its_decode(joined: Joined) -> None:
    joined.open(1)
    joined.step(1, 1, prefill=True)
    joined.step(2, 1)
    joined.step(3, 1, finished=[1])
    assert names(joined) == []  # never before both ends are known
    joined.end(1, 3, "length")
    assert names(joined) == [
        *("queue", "forward", "attention", "sample", "prefill"),
        *("forward", "attention", "sample", "decode_step"),
        *("forward", "attention", "sample", "decode_step", "decode"),
    ]
    queue, prefill, decode = (joined.only(name) for name in ("queue", "prefill", "decode"))
    assert (times(queue), times(prefill), times(decode)) == ((1, 9), (10, 18), (20, 38))
    for span in (queue, prefill, decode):
        assert parent_id(span) == 1
        assert span.kind is SpanKind.INTERNAL
        assert attributes(span)["gen_ai.request.id"] == "cmpl-1"
        assert span.resource.attributes["process.pid"] == 1
    assert {trace_id(span) for span in joined.spans if span.name != "engine_step"} == {int.from_bytes(b"r" * 16, "big")}
    assert joined.is_empty()


def test_all_spans_of_a_request_are_sent_at_once(joined: Joined) -> None:
    joined.open(1)
    joined.step(1, 1, prefill=True)
    joined.step(2, 1, finished=[1])
    joined.end(1, 2)
    *steps, (account, spans) = joined.puts
    assert [span.name for _, [span] in steps] == ["engine_step", "engine_step"]
    assert account is joined.engine.account
    assert {"queue", "prefill", "decode"} <= {span.name for span in spans}


def test_the_stages_of_a_prefill_are_nested_as_in_its_step(joined: Joined) -> None:
    joined.open(1)
    joined.step(4, 1, prefill=True, finished=[1])
    joined.end(1, 1)
    forward, sample = joined.children(joined.only("prefill"))
    [attention] = joined.children(forward)
    assert (forward.name, sample.name, attention.name) == ("forward", "sample", "attention")
    assert (times(forward), times(attention), times(sample)) == ((40, 46), (41, 43), (46, 48))
    assert attributes(forward) == {
        "npu.timing": "host",
        "npu.host.duration": pytest.approx(6e-3),
        "npu.step.number": 4,
        "npu.rank": 0,
    }


def test_requests_that_are_referred_to_have_their_steps_as_if_they_were_listed(joined: Joined) -> None:
    joined.open(1, 2)
    joined.step(1, 1, 2, prefill=True)
    joined.step(2, 1, 2)
    for number in range(3, 40):
        joined.schedule(number, like=id_of(2), total_tokens=2, total_requests=2)
        joined.run(number)
        joined.update(number, each=1)
    joined.step(40, 1, 2, finished=[1, 2])
    joined.end(1, 40, "length")
    joined.end(2, 40, "length")
    for decode in joined.named("decode"):
        said = attributes(decode)
        assert said["npu.request.steps"] == 39
        assert "npu.request.surplus_steps" not in said


def test_a_step_that_refers_to_one_that_was_lost_is_a_step_all_the_same(joined: Joined) -> None:
    joined.open(1)
    joined.step(1, 1, prefill=True)
    joined.schedule(3, like=id_of(2))
    joined.run(3)
    joined.update(3, each=1)
    joined.step(4, 1, finished=[1])
    joined.end(1, 3, "length")
    assert joined.told("decode")["steps"] == 1
    assert len(joined.named("engine_step")) == 3


def test_what_the_phases_say(joined: Joined) -> None:
    joined.open(1)
    joined.step(1, 1, prefill=True)
    joined.step(2, 1)
    joined.step(4, 1)
    joined.step(5, 1, finished=[1])
    joined.end(1, 4, "length")
    prefill, decode = joined.told("prefill"), joined.told("decode")
    assert (prefill["steps"], decode["steps"]) == (1, 3)
    assert (ms(prefill["device_time"]), ms(decode["device_time"])) == (8, 24)
    assert (ms(decode["stage.forward.device_time"]), ms(decode["stage.sample.device_time"])) == (18, 6)
    assert "stage.attention.device_time" not in decode  # it is in forward already
    assert (ms(prefill["wait"]), ms(decode["wait"])) == (0, 14)
    assert attributes(joined.only("decode"))["npu.rank"] == 0
    assert "finish_reason" not in prefill
    assert decode["finish_reason"] == "length"
    assert not [key for key in decode if key.startswith(("surplus", "untimed"))]


def test_a_phase_that_did_not_run_is_no_span(joined: Joined) -> None:
    joined.open(1, 2)
    joined.step(1, 1, prefill=True, finished=[1])
    joined.step(2, 2, finished=[2])  # its prompt was computed by another engine
    joined.end(1, 1)
    joined.end(2, 1)
    assert [name for name in names(joined) if name in ("queue", "prefill", "decode")] == [
        *("queue", "prefill"),
        *("queue", "decode"),
    ]


def test_requests_of_one_call_share_its_trace_but_nothing_else(joined: Joined) -> None:
    joined.open(1, 2, 3)
    joined.step(1, 1, 2, 3, prefill=True)
    joined.step(2, 1, 2, finished=[1, 2])
    joined.step(3, 3, finished=[3])
    for number, tokens in ((1, 2), (2, 2), (3, 2)):
        joined.end(number, tokens)
    assert sorted(parent_id(span) or 0 for span in joined.named("decode")) == [1, 2, 3]
    ids = [span_id(span) for span in joined.spans]
    assert len(set(ids)) == len(ids)
    assert {times(span) for span in joined.named("decode")} == {(20, 28), (30, 38)}


def test_a_step_may_prefill_one_request_and_decode_another(joined: Joined) -> None:
    joined.open(1, 2)
    joined.step(1, 1, prefill=True)
    joined.step(2, 1, 2, prefill={2}, finished=[1, 2])
    joined.end(1, 2)
    joined.end(2, 1)
    assert [times(span) for span in joined.named("prefill")] == [(10, 18), (20, 28)]
    assert [(parent_id(span), times(span)) for span in joined.named("decode")] == [(1, (20, 28))]


# The prompt in pieces


def test_a_chunked_prefill_is_one_phase(joined: Joined) -> None:
    joined.open(1)
    for number in (1, 2):
        joined.schedule(number, {1: 512}, prefill=True)
        joined.run(number)
        joined.update(number)  # a piece of the prompt gives no output
    joined.step(3, 1, prefill=True)
    joined.step(4, 1, finished=[1])
    joined.end(1, 2)
    assert times(joined.only("prefill")) == (10, 38)
    assert joined.told("prefill")["steps"] == 3
    steps = joined.children(joined.only("prefill"))
    assert [attributes(span)["npu.step.number"] for span in steps] == [1, 2, 3]
    assert [attributes(span)["npu.request.step_tokens"] for span in steps] == [512, 512, 1]
    assert joined.told("decode")["steps"] == 1


def test_of_a_very_long_prefill_only_so_many_steps_are_shown(joined: Joined) -> None:
    joined.open(1)
    steps = SHOWN_PREFILL_STEPS + 100
    for number in range(1, steps + 1):
        joined.schedule(number, {1: 512}, prefill=True)
        joined.run(number)
        joined.update(number, {1: 1} if number == steps else {}, finished=[1] if number == steps else [])
    joined.end(1, 1)
    told = joined.told("prefill")
    assert (told["steps"], told["other_steps"]) == (steps, 100)
    assert ms(told["device_time"]) == 8 * steps
    assert times(joined.only("prefill")) == (10, 10 * steps + 8)
    assert len(joined.named("prefill_step")) == SHOWN_PREFILL_STEPS


# Preemption


def test_preemptions_are_events_of_the_phase_in_which_they_happened(joined: Joined) -> None:
    joined.open(1, 2)
    joined.schedule(1, {1: 512}, prefill=True)
    joined.run(1)
    joined.update(1)
    joined.step(2, 2, prefill=True, preempted=[1])
    joined.schedule(3, {1: 512}, prefill=True)  # from the beginning
    joined.run(3)
    joined.update(3, {1: 1})
    joined.step(4, 1)
    joined.step(5, 2, preempted=[1], finished=[2])
    joined.schedule(6, {1: 514}, prefill=True)  # its prompt again, but it has an answer already
    joined.run(6)
    joined.update(6, {1: 1}, finished=[1])
    joined.end(1, 3)
    prefill, decode = joined.only("prefill"), joined.only("decode")
    assert (times(prefill), times(decode)) == ((10, 38), (40, 68))
    assert joined.only("queue").events == ()
    [event] = prefill.events
    assert (event.name, event.timestamp) == ("preempted", UNIX_NS + 19_500_000)
    [event] = decode.events
    assert (event.name, event.timestamp) == ("preempted", UNIX_NS + 49_500_000)
    encode_spans(joined.spans)


def test_the_preemption_of_a_phase_without_a_span_is_not_lost(joined: Joined) -> None:
    joined.open(1, 2)
    joined.schedule(1, {1: 512}, prefill=True)
    joined.update(1)  # its rank never says when it ran
    joined.step(2, 2, prefill=True, preempted=[1])
    joined.end(1, 0, "abort", at_ms=25)
    joined.schedule(3, {2: 1}, ended=[1])
    joined.pass_seconds(0.81)
    assert names(joined) == ["queue"]
    [event] = joined.only("queue").events
    assert event.name == "preempted"
    assert joined.told("queue") == {"finish_reason": "abort", "untimed_steps": 1}


# Ends: the engine's and the front end's


@pytest.mark.parametrize("first", ["front end", "engine"])
def test_either_end_may_come_first(joined: Joined, first: str) -> None:
    joined.open(1)
    joined.step(1, 1, prefill=True)
    joined.schedule(2, {1: 1})
    joined.run(2)
    if first == "front end":
        joined.end(1, 2)
        assert names(joined) == []
        joined.update(2, {1: 1}, finished=[1])
    else:
        joined.update(2, {1: 1}, finished=[1])
        assert names(joined) == []
        joined.end(1, 2)
    assert times(joined.only("decode")) == (20, 28)


def test_the_run_of_the_last_step_may_come_last(joined: Joined) -> None:
    joined.open(1)
    joined.schedule(1, {1: 5}, prefill=True)
    joined.update(1, {1: 1}, finished=[1])
    joined.end(1, 1)
    assert names(joined) == []
    joined.run(1)
    assert times(joined.only("prefill")) == (10, 18)


def test_the_front_ends_end_may_come_before_the_request_is_known(joined: Joined) -> None:
    joined.end(1, 1)
    joined.open(1)
    joined.step(1, 1, prefill=True, finished=[1])
    assert times(joined.only("prefill")) == (10, 18)
    assert joined.told("prefill")["finish_reason"] == "stop"


def test_an_end_of_a_request_that_nobody_knows_is_forgotten(joined: Joined) -> None:
    joined.end(1, 1)
    assert joined.joiner.waiting
    joined.pass_seconds(2.1)
    assert joined.is_empty()
    assert joined.drops.take_line() == ""


def test_nothing_is_left_of_requests_that_vllm_rejects_on_arrival(joined: Joined) -> None:
    """Whether its engine has refused it before it knew it, or has known it and never scheduled it."""
    joined.open(*range(1, 101))
    for number in range(1, 201):
        joined.end(number, 0, "error")
    joined.schedule(1, {}, total_tokens=0, total_requests=0, ended=list(range(1, 101)))
    joined.pass_seconds(2.1)
    assert joined.is_empty()
    assert joined.drops.take_line() == ""
    assert names(joined) == ["queue"] * 100
    assert {attributes(span)["npu.request.finish_reason"] for span in joined.spans} == {"error"}


def test_where_the_front_end_is_on_another_host_the_engines_end_counts(joined: Joined) -> None:
    joined.open(1)
    joined.step(1, 1, prefill=True)
    joined.schedule(2, {1: 1})
    joined.schedule(3, {1: 1})
    joined.run(2)
    joined.update(2, {1: 1}, finished=[1])
    joined.run(3)
    joined.pass_seconds(0.79)
    assert names(joined) == []
    joined.pass_seconds(0.02)
    assert times(joined.only("decode")) == (20, 28)
    told = joined.told()
    assert (told["steps"], told["surplus_steps"]) == (1, 1)
    assert "finish_reason" not in told


def test_an_engine_that_lets_go_of_a_request_ends_it(joined: Joined) -> None:
    """Its front end is on another host: what was under way then was surplus."""
    joined.open(1)
    joined.step(1, 1, prefill=True)
    joined.step(2, 1)
    joined.schedule(3, {1: 1})
    joined.schedule(4, total_tokens=0, trace_id=b"", ended=[1])
    joined.run(3)
    joined.update(3)
    joined.pass_seconds(0.81)
    told = joined.told()
    assert (told["steps"], told["surplus_steps"]) == (1, 1)
    assert joined.is_empty()


def test_a_missing_rank_is_made_up_for_by_the_lowest(joined: Joined) -> None:
    joined.open(1)
    joined.schedule(1, {1: 5}, prefill=True, ranks=4)
    joined.run(1, 2, returns_output=False)
    joined.run(1, 1, returns_output=False)
    joined.update(1, {1: 1}, finished=[1])
    joined.end(1, 1)
    assert names(joined) == []
    joined.pass_seconds(0.81)
    assert attributes(joined.only("prefill"))["npu.rank"] == 1
    assert joined.is_empty()


def test_times_are_those_of_the_rank_that_returns_the_output(joined: Joined) -> None:
    joined.open(1)
    joined.schedule(1, {1: 5}, prefill=True, ranks=2)
    joined.run(1, 0, returns_output=False)
    joined.update(1, {1: 1}, finished=[1])
    joined.end(1, 1)
    assert names(joined) == []
    joined.run(1, 1, returns_output=True, stages=[host_stage("forward", 14 * MS, 2 * MS)])
    assert times(joined.only("prefill")) == (14, 16)
    assert attributes(joined.only("prefill"))["npu.rank"] == 1


def test_steps_without_times_are_counted_apart(joined: Joined) -> None:
    joined.open(1)
    joined.step(1, 1, prefill=True)
    joined.schedule(2, {1: 1})
    joined.update(2, {1: 1})
    joined.step(3, 1, finished=[1])
    joined.end(1, 3)
    joined.pass_seconds(0.81)
    assert (joined.told()["steps"], joined.told()["untimed_steps"]) == (1, 1)


# Surplus steps


def test_a_step_after_a_stop_string_is_surplus(joined: Joined) -> None:
    """The front end finds the string in the second token; the engine learns of it a step later."""
    joined.open(1)
    joined.step(1, 1, prefill=True)
    joined.step(2, 1)
    joined.end(1, 2, "stop", at_ms=29.5)
    joined.step(3, 1)
    joined.schedule(4, total_tokens=0, trace_id=b"", ended=[1])
    assert times(joined.only("decode")) == (20, 28)
    told = joined.told()
    assert (told["steps"], told["surplus_steps"], ms(told["surplus_device_time"])) == (1, 1, 8)
    assert ms(told["device_time"]) == 8
    assert ms(told["attributed_device_time"]) == 16


def test_a_step_scheduled_before_the_last_output_was_known_is_surplus(joined: Joined) -> None:
    """A one-token request with async scheduling runs two forwards, and the second has no output."""
    joined.open(1)
    joined.schedule(1, {1: 5}, prefill=True)
    joined.schedule(2, {1: 1}, opened_ns=12 * MS)
    joined.run(1)
    joined.update(1, {1: 1}, finished=[1])
    joined.end(1, 1, "length")
    assert names(joined) == []
    joined.run(2)
    assert names(joined) == ["queue", "forward", "attention", "sample", "prefill"]
    told = joined.told("prefill")
    assert (told["steps"], told["surplus_steps"], ms(told["surplus_device_time"])) == (1, 1, 8)
    joined.pass_seconds(1.1)
    assert len(joined.named("engine_step")) == 2
    assert joined.is_empty()


def test_with_several_tokens_a_step_the_one_that_reaches_the_end_is_not_surplus(joined: Joined) -> None:
    joined.open(1)
    joined.step(1, 1, prefill=True)
    for number, new_tokens in ((2, 4), (3, 4)):
        joined.schedule(number, {1: 4})
        joined.run(number)
        joined.update(number, {1: new_tokens})
    joined.end(1, 3)
    joined.schedule(4, total_tokens=0, trace_id=b"", ended=[1])
    assert (joined.told()["steps"], joined.told()["surplus_steps"]) == (1, 1)


def test_a_pooled_request_has_an_end_without_tokens(joined: Joined) -> None:
    joined.open(1)
    joined.schedule(1, {1: 512}, prefill=True)
    joined.run(1)
    joined.update(1)
    joined.schedule(2, {1: 100}, prefill=True)
    joined.run(2)
    joined.update(2, {1: 0}, finished=[1])
    joined.end(1, 0)
    assert joined.told("prefill")["steps"] == 2
    assert "surplus_steps" not in joined.told("prefill")


# Aborts


def test_a_request_aborted_in_the_queue_has_waited_until_then(joined: Joined) -> None:
    joined.open(1)
    joined.end(1, 0, "abort", at_ms=42)
    assert names(joined) == []
    joined.schedule(9, total_tokens=0, trace_id=b"", ended=[1])
    assert names(joined) == ["queue"]
    assert times(joined.only("queue")) == (1, 42)
    assert joined.told("queue") == {"finish_reason": "abort"}
    assert joined.is_empty()


def test_of_one_that_the_engine_alone_knows_to_be_over_the_engines_end_counts(joined: Joined) -> None:
    joined.open(1)
    joined.schedule(5, total_tokens=0, trace_id=b"", ended=[1])
    joined.pass_seconds(0.81)
    assert times(joined.only("queue")) == (1, 49)


def test_a_step_scheduled_after_the_abort_is_surplus_and_the_queue_ends_with_the_request(joined: Joined) -> None:
    joined.open(1)
    joined.end(1, 0, "abort", at_ms=5)
    joined.step(1, 1, prefill=True)
    joined.schedule(2, total_tokens=0, trace_id=b"", ended=[1])
    assert names(joined) == ["queue"]
    assert times(joined.only("queue")) == (1, 5)
    told = joined.told("queue")
    assert (told["surplus_steps"], ms(told["surplus_device_time"]), ms(told["attributed_device_time"])) == (1, 8, 8)


def test_a_request_aborted_in_its_prefill_has_what_it_used_of_the_device(joined: Joined) -> None:
    joined.open(1)
    for number in (1, 2, 3):
        joined.schedule(number, {1: 512}, prefill=True)
        joined.run(number)
        joined.update(number)
    joined.end(1, 0, "abort", at_ms=33)
    joined.schedule(4, total_tokens=0, trace_id=b"", ended=[1])
    prefill = joined.only("prefill")
    assert times(prefill) == (10, 28)
    told = joined.told("prefill")
    assert (told["steps"], told["surplus_steps"], told["finish_reason"]) == (2, 1, "abort")


def test_all_spans_of_a_request_aborted_in_its_decode_lie_before_the_abort(joined: Joined) -> None:
    joined.open(1)
    joined.step(1, 1, prefill=True)
    for number in range(2, 7):
        joined.step(number, 1)
    joined.end(1, 4, "abort", at_ms=55)
    joined.schedule(7, {}, ended=[1])
    assert times(joined.only("decode")) == (20, 48)
    told = joined.told()
    assert (told["steps"], told["surplus_steps"]) == (3, 2)
    spans = [span for span in joined.spans if span.name != "engine_step"]
    assert max(times(span)[1] for span in spans) <= 55


# Device time and shares


def test_device_time_is_what_the_device_timed(joined: Joined) -> None:
    stages = [
        stage(name="forward", device_ns=5 * MS, duration_ns=6 * MS),
        stage(name="attention", parent=0, device_ns=5 * MS, duration_ns=2 * MS),
        host_stage("bookkeep", 12 * MS, 3 * MS),
        stage(name="draft", entered_ns=13 * MS, exited_ns=14 * MS, device_ns=13 * MS, duration_ns=MS),
        stage(name="forward", entered_ns=15 * MS, exited_ns=16 * MS, device_ns=16 * MS, duration_ns=MS),
    ]
    joined.open(1)
    joined.schedule(1, {1: 1}, prefill=True)
    joined.run(1, stages=stages, seen_ns=20 * MS)
    joined.update(1, {1: 1}, finished=[1])
    joined.end(1, 1)
    told = joined.told("prefill")
    assert ms(told["device_time"]) == 8
    assert ms(told["stage.forward.device_time"]) == 7
    assert ms(told["stage.draft.device_time"]) == 1
    assert "stage.bookkeep.device_time" not in told


def test_the_shares_of_all_requests_of_a_step_add_up_to_it(joined: Joined) -> None:
    """Of mixed batches, some steps surplus for one, some after the end of another."""
    joined.open(1, 2, 3)
    joined.schedule(1, {1: 7, 2: 512}, prefill=True)
    joined.run(1)
    joined.update(1, {1: 1})
    joined.schedule(2, {1: 1, 2: 100, 3: 30}, prefill={2, 3})
    joined.run(2)
    joined.update(2, {1: 1, 2: 1, 3: 1}, finished=[3])
    joined.schedule(3, {1: 1, 2: 1})
    joined.run(3)
    joined.update(3, {1: 1, 2: 1}, finished=[2])
    joined.end(1, 2, "stop", at_ms=29)  # so its third step was surplus
    joined.schedule(4, total_tokens=0, trace_id=b"", ended=[1])
    joined.end(2, 2)
    joined.end(3, 1)
    shares = [attributes(span).get("npu.request.attributed_device_time", 0.0) for span in joined.spans]
    assert ms(sum(shares)) == pytest.approx(3 * 8)
    assert joined.is_empty()


def test_the_share_is_by_all_tokens_of_the_step_not_only_by_those_of_sampled_requests(joined: Joined) -> None:
    joined.open(1)
    joined.schedule(1, {1: 1}, total_tokens=4, total_requests=4)
    joined.run(1)
    joined.update(1, {1: 1}, finished=[1])
    joined.end(1, 1)
    assert ms(joined.told()["attributed_device_time"]) == 2
    assert ms(joined.told()["device_time"]) == 8


def test_a_step_that_is_no_trace_is_part_of_its_requests_all_the_same(joined: Joined) -> None:
    joined.open(1)
    joined.schedule(1, {1: 5}, prefill=True, trace_id=b"")
    assert joined.run(1, trace_id=b"", span_id=b"") == []
    joined.update(1, {1: 1}, finished=[1])
    joined.end(1, 1)
    assert [span.name for span in joined.spans] == ["queue", "forward", "attention", "sample", "prefill"]


# Any order


def a_service(joined: Joined, rng: random.Random, depth: int) -> list[list[Callable[[], Any]]]:
    """What an engine, its two workers and a front end say of some requests, each in its own order.

    Up to `depth` steps are scheduled before an output is taken in. Some requests end by the engine, some by a stop
    string that only the front end sees, some by an abort.
    """
    engine: list[Callable[[], Any]] = []
    workers: list[list[Callable[[], Any]]] = [[], []]
    front_end: list[Callable[[], Any]] = []
    left = {number: rng.randint(1, 6) for number in range(1, rng.randint(2, 6))}
    reasons = {number: rng.choice(["length", "stop", "abort"]) for number in left}
    given = dict.fromkeys(left, 0)
    scheduled, ended = dict.fromkeys(left, 0), list[int]()
    flying: list[tuple[int, list[int]]] = []
    engine.append(partial(joined.open, *left))

    def take_in() -> None:
        number, served = flying.pop(0)
        gave, finished = {}, []
        for request in served:
            if request not in left:
                continue
            gave[request] = 1
            given[request] += 1
            if given[request] < left[request]:
                continue
            front_end.append(partial(joined.end, request, given[request], reasons[request], number * 10 + 9.5))
            del left[request]
            if reasons[request] == "length":
                finished.append(request)
            else:
                ended.append(request)
        engine.append(partial(joined.update, number, gave, finished=finished))

    number = 0
    while left:
        number += 1
        served = sorted(rng.sample(sorted(left), rng.randint(1, len(left))))
        prefill = {request for request in served if not scheduled[request]}
        for request in served:
            scheduled[request] += 1
        tokens = {request: rng.randint(1, 99) for request in served}
        engine.append(partial(joined.schedule, number, tokens, prefill=prefill, ranks=2, ended=ended[:]))
        ended.clear()
        for rank in (0, 1):
            workers[rank].append(partial(joined.run, number, rank))
        flying.append((number, served))
        while len(flying) >= depth:
            take_in()
    engine.append(partial(joined.schedule, number + 1, trace_id=b"", total_tokens=0, ended=ended[:]))
    return [engine, *workers, front_end]


def heard(seed: int, depth: int, order: random.Random | None) -> tuple[Joined, list[Any]]:
    """All spans of a service whose processes' frames are read in this order; in turn without one."""
    joined = Joined()
    says = a_service(joined, random.Random(seed), depth)
    while any(says):
        process = next(filter(None, says)) if order is None else order.choice([frames for frames in says if frames])
        process.pop(0)()
    joined.pass_seconds(1.1)  # for the steps that never have an output
    spans = [
        (
            span.name,
            times(span),
            parent_id(span) if span.name in ("queue", "prefill", "decode") else None,
            sorted((key, str(value)) for key, value in attributes(span).items()),
        )
        for span in joined.spans
    ]
    return joined, sorted(spans, key=str)


@settings(max_examples=60)
@given(st.integers(0, 2**32), st.integers(1, 3), st.randoms(use_true_random=False))
def test_the_spans_do_not_depend_on_the_order_in_which_processes_are_read(
    seed: int, depth: int, order: random.Random
) -> None:
    joined, spans = heard(seed, depth, order)
    assert spans == heard(seed, depth, None)[1]
    assert joined.is_empty()
    requests = {parent_id(span) for span in joined.named("queue")}
    assert len(requests) == len(joined.named("queue"))
    for _, put in joined.puts:  # each request's in one
        assert len({parent_id(span) for span in put if span.name in ("queue", "prefill", "decode")}) <= 1
    shares = sum(attributes(span).get("npu.request.attributed_device_time", 0.0) for span in joined.spans)
    assert ms(shares) == pytest.approx(8 * len(joined.named("engine_step")))


# Bounds


def test_a_long_decode_is_summed_up(joined: Joined) -> None:
    joined.open(1)
    joined.step(1, 1, prefill=True)
    last = 10 * RECENT_STEPS
    for number in range(2, last + 1):
        joined.step(number, 1)
        [request] = joined.joiner._requests.values()
        assert len(request._parts) <= RECENT_STEPS
    joined.end(1, last)
    joined.schedule(last + 1, total_tokens=0, trace_id=b"", ended=[1])
    told = joined.told()
    assert told["steps"] == last - 1
    assert ms(told["device_time"]) == pytest.approx(8 * (last - 1))
    assert ms(told["wait"]) == pytest.approx(2 * (last - 2))
    assert times(joined.only("decode")) == (20, 10 * last + 8)
    assert len(joined.named("decode_step")) == 3


def test_of_too_many_requests_at_once_the_newest_are_left_out(joined: Joined, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joiner, "MAX_REQUESTS", 10)
    joined.open(*range(1, 12))
    assert joined.drops.take_line() == "1 too_many_requests"
    assert joined.engine.account.lost == 1  # its next flush says so
    joined.step(1, 1, 11, prefill=True, finished=[1, 11])
    joined.end(1, 1)
    joined.end(11, 1)
    assert [parent_id(span) for span in joined.named("queue")] == [1]


def test_an_engine_with_requests_without_end_costs_others_none_of_theirs(
    joined: Joined, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joiner, "MAX_REQUESTS", 10)
    flooding = joined.client(pid=66)
    joined.open(1, 2)
    for number in range(100, 150):
        joined.joiner.take(flooding, built.request(number))
    joined.open(3, 4, 5)
    assert joined.drops.take_line() == "45 too_many_requests"
    assert (joined.engine.account.lost, flooding.account.lost) == (0, 45)
    joined.step(1, 1, 5, prefill=True, finished=[1, 5])
    joined.end(1, 1)
    joined.end(5, 1)
    assert {parent_id(span) for span in joined.named("queue")} == {1, 5}


def test_nothing_is_kept_of_10000_requests(joined: Joined) -> None:
    def alive() -> int:
        gc.collect()
        return sum(type(item) in {EngineStep, StepTimes, OpenRequest, Phase} for item in gc.get_objects())

    before = alive()
    joined.joiner._put = lambda spans, account: None
    number = 0
    for batch in range(1, 1_001):
        requests = dict.fromkeys(range(number + 1, number + 11), 1)
        number += 10
        joined.open(*requests)
        joined.schedule(batch, requests, prefill=True, trace_id=b"")
        joined.run(batch, trace_id=b"", span_id=b"", stages=[])
        joined.update(batch, requests, finished=list(requests))
        for request in requests:
            joined.end(request, 1)
    assert number == 10_000
    assert joined.is_empty()
    assert alive() == before


def test_a_request_that_is_over_is_not_kept_by_one_that_shared_its_steps(joined: Joined) -> None:
    joined.open(1)
    for number in range(2, 50):
        joined.open(number)
        joined.step(number, 1, number, finished=[number])
        joined.end(number, 1)
    [left] = joined.joiner._requests.values()
    assert left.frame.number == 1
    assert all(not part.step.parts and not part.step.ranks for part in left._parts)


# The end of an engine, of the relay, and flushes


def test_what_an_engine_that_dies_leaves_unfinished_is_counted_and_no_spans(joined: Joined) -> None:
    joined.open(1, 2, 3)
    joined.step(1, 1, 2, 3, prefill=True)
    joined.schedule(2, {1: 1, 2: 1})
    joined.end(3, 1)
    joined.joiner.part(joined.engine)
    joined.run(2)
    joined.pass_seconds(1)
    assert [parent_id(span) for span in joined.named("queue")] == [3]  # its end was known
    assert joined.drops.take_line() == "2 request_unfinished"
    assert joined.engine.account.lost == 2
    joined.end(1, 1, "abort")
    joined.pass_seconds(2.1)
    assert joined.is_empty()
    assert len(joined.named("queue")) == 1


def test_the_engines_end_of_a_request_survives_the_engine(joined: Joined) -> None:
    joined.open(1)
    joined.step(1, 1, prefill=True, finished=[1])
    joined.joiner.part(joined.engine)
    joined.end(1, 1)
    assert joined.told("prefill")["finish_reason"] == "stop"


def test_a_flush_sends_the_requests_that_are_over(joined: Joined) -> None:
    joined.open(1, 2)
    joined.schedule(1, {1: 5, 2: 5}, prefill=True, ranks=2)
    joined.run(1)
    joined.update(1, {1: 1, 2: 1}, finished=[1])
    joined.joiner.flush()
    assert [parent_id(span) for span in joined.named("prefill")] == [1]
    joined.step(2, 2, finished=[2])
    joined.end(2, 2)
    assert len(joined.named("prefill")) == 2


def test_draining_sends_what_is_over_and_counts_the_rest(joined: Joined) -> None:
    joined.open(1, 2)
    joined.step(1, 1, 2, prefill=True, finished=[1])
    joined.joiner.drain()
    assert [parent_id(span) for span in joined.named("prefill")] == [1]
    assert joined.drops.take_line() == "1 request_unfinished"
    assert joined.is_empty()


# Names


def test_every_name_in_these_spans_is_a_convention(joined: Joined) -> None:
    joined.open(1, 2)
    joined.drops.add(semconv.QUEUE_FULL)
    joined.step(1, 1, 2, prefill=True)
    joined.step(2, 1, 2, preempted=[])
    joined.step(3, 2, preempted=[1])
    joined.schedule(4, {1: 1})
    joined.update(4, {1: 1})
    joined.step(5, 1)
    joined.end(1, 2)
    joined.end(2, 9, "abort", at_ms=29)
    joined.schedule(6, {}, ended=[1, 2])
    joined.pass_seconds(0.81)

    def declared(name: str, terms: tuple[semconv.Term, ...]) -> bool:
        return any(re.fullmatch(re.sub(r"<\w+>", r"\\w+", re.escape(term.name)), name) for term in terms)

    assert len(joined.named("decode")) == 2
    stages = {"forward", "attention", "sample"}
    for span in joined.spans:
        assert span.name in stages or declared(span.name, semconv.SPANS)
        assert {event.name for event in span.events} <= {term.name for term in semconv.EVENTS}
        for key in attributes(span):
            assert declared(key, semconv.ATTRIBUTES), key
    reasons: Any = [term.name for term in semconv.DROP_REASONS]
    assert {semconv.REQUEST_UNFINISHED, semconv.TOO_MANY_REQUESTS} <= set(reasons)
