"""An engine's step, joined from its scheduling, its ranks' runs and the taking in of its output, in any order."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import pytest
from opentelemetry.trace import SpanKind

from otel_npu import semconv
from otel_npu._version import __version__
from otel_npu.relay import joiner
from otel_npu.wire import frames
from tests.helpers.built import step
from tests.helpers.joined import MS, STEP_NS, Joined, attributes, host_stage, id_of, parent_id, span_id, times, trace_id

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture
def joined() -> Joined:
    return Joined()


# What the span says


def test_an_engine_step_reaches_from_its_scheduling_to_the_taking_in_of_its_output(joined: Joined) -> None:
    joined.schedule(1, {7: 5, 8: 1}, kind="mixed", ranks=1, total_tokens=9, total_requests=3)
    [*_, worker] = joined.run(1)
    assert joined.spans == []  # its end is not known yet
    joined.update(1)
    span = joined.only("engine_step")
    assert times(span) == (9, 19)
    assert (span_id(span), span.parent, span.kind) == (1, None, SpanKind.INTERNAL)
    assert parent_id(worker) == span_id(span)
    assert trace_id(worker) == trace_id(span)
    assert attributes(span) == {
        "npu.step.number": 1,
        "npu.step.kind": "mixed",
        "npu.step.requests": 3,
        "npu.step.tokens": 9,
        "npu.step.ranks": 1,
        "npu.timing": "host",
        "npu.sampled.reason": "rate",
    }
    assert span.instrumentation_scope is not None
    assert span.instrumentation_scope.version == __version__
    assert joined.is_empty()


def test_it_is_the_engines_span_not_the_workers(joined: Joined) -> None:
    joined.step(1)
    [(account, [span])] = joined.puts
    assert account is joined.engine.account
    assert span.resource.attributes["process.pid"] == 1


def test_a_worker_step_says_its_rank(joined: Joined) -> None:
    [*_, worker] = joined.run(1, rank=3)
    assert attributes(worker)["npu.rank"] == 3
    [*_, plain] = joined.engine.assembler.step(step(1))
    assert "npu.rank" not in attributes(plain)


def test_it_links_once_to_the_span_of_each_sampled_request(joined: Joined) -> None:
    joined.open(1)
    joined.open(2, 3, parent_span_id=b"c" * 8)  # two sequences of one call, without a span of their own
    joined.schedule(1, {1: 1, 2: 1, 3: 1, 99: 1})
    joined.run(1)
    joined.update(1)
    links = [(link.context.trace_id, link.context.span_id) for link in joined.only("engine_step").links]
    trace = int.from_bytes(b"r" * 16, "big")
    assert links == [(trace, 1), (trace, int.from_bytes(b"c" * 8, "big"))]


def test_a_batch_of_1000_requests_keeps_all_its_links(joined: Joined) -> None:
    joined.open(*range(1, 1001))
    joined.schedule(1, dict.fromkeys(range(1, 1001), 1))
    joined.run(1)
    joined.update(1)
    assert len(joined.only("engine_step").links) == 1000


def test_drops_of_the_engine_and_of_the_relay_go_with_its_next_step_span(joined: Joined) -> None:
    joined.schedule(1, total_tokens=0, trace_id=b"", dropped={"backlog_full": 2})  # no step: it only carries
    joined.schedule(2, trace_id=b"", dropped={"backlog_full": 1})
    joined.run(2, trace_id=b"", span_id=b"")
    joined.update(2)
    joined.drops.add(semconv.QUEUE_FULL, 4)
    joined.step(3)
    joined.step(4)
    first, second = joined.named("engine_step")
    said = attributes(first)
    assert (said["npu.dropped.backlog_full"], said["npu.dropped.queue_full"]) == (3, 4)
    assert not [key for key in attributes(second) if key.startswith("npu.dropped")]


def test_drops_of_a_front_end_go_with_the_next_step_span_of_any_engine(joined: Joined) -> None:
    joined.end(1, 1, dropped={"internal_error": 2})
    joined.open(1)
    joined.step(1)
    joined.step(2)
    first, second = joined.named("engine_step")
    assert attributes(first)["npu.dropped.internal_error"] == 2
    assert not [key for key in attributes(second) if key.startswith("npu.dropped")]


def test_a_step_that_was_not_chosen_is_no_span_of_any_process(joined: Joined) -> None:
    joined.schedule(1, trace_id=b"")
    assert joined.run(1, trace_id=b"", span_id=b"") == []
    joined.update(1)
    assert joined.spans == []
    assert joined.is_empty()


# The order in which frames come


@pytest.mark.parametrize("order", list(itertools.permutations(["engine", "rank 0", "rank 1"])), ids=", ".join)
def test_the_frames_of_different_processes_may_come_in_any_order(joined: Joined, order: tuple[str, ...]) -> None:
    def engine() -> None:
        joined.schedule(1, ranks=2)
        joined.update(1)

    says: dict[str, Callable[[], Any]] = {
        "engine": engine,
        "rank 0": lambda: joined.run(1, 0),
        "rank 1": lambda: joined.run(1, 1),
    }
    for process in order[:-1]:
        says[process]()
        assert joined.spans == []
    says[order[-1]]()
    assert times(joined.only("engine_step")) == (9, 19)
    assert joined.is_empty()


def test_with_async_scheduling_steps_overlap(joined: Joined) -> None:
    joined.schedule(1)
    joined.schedule(2, opened_ns=12 * MS)
    joined.run(1)
    joined.update(1)
    assert [attributes(span)["npu.step.number"] for span in joined.named("engine_step")] == [1]
    joined.run(2)
    joined.update(2)
    first, second = joined.named("engine_step")
    assert times(first)[1] > times(second)[0]


def test_it_ends_no_earlier_than_what_its_ranks_say(joined: Joined) -> None:
    joined.schedule(1, ranks=2)
    joined.update(1)
    joined.run(1, 0)
    [*_, slow] = joined.run(1, 1, stages=[host_stage("forward", STEP_NS, 15 * MS)])
    assert times(slow) == (10, 25)  # never cut to the engine's step
    assert times(joined.only("engine_step")) == (9, 25)


# What never comes


def test_a_missing_rank_is_waited_for_but_not_long(joined: Joined) -> None:
    joined.schedule(1, ranks=2)
    joined.run(1, 0)
    joined.update(1)
    joined.pass_seconds(0.79)
    assert joined.spans == []
    joined.pass_seconds(0.02)
    assert times(joined.only("engine_step")) == (9, 19)
    [*_, late] = joined.run(1, 1)
    assert parent_id(late) == span_id(joined.only("engine_step"))
    joined.pass_seconds(2.1)
    assert len(joined.spans) == 1
    assert joined.is_empty()


def test_a_step_without_output_is_closed_by_the_output_of_a_later_one(joined: Joined) -> None:
    joined.schedule(1)
    joined.run(1)
    joined.schedule(2)
    assert joined.spans == []
    joined.run(2)
    joined.update(2)
    first, second = joined.named("engine_step")
    assert (times(first), times(second)) == ((9, 18), (19, 29))  # it ends with its rank's last stage


def test_a_step_without_output_is_closed_a_second_after_its_run(joined: Joined) -> None:
    joined.schedule(1)
    joined.pass_seconds(5)  # a long prompt: it is still running
    assert joined.spans == []
    joined.run(1)
    joined.pass_seconds(0.99)
    assert joined.spans == []
    joined.pass_seconds(0.02)
    assert times(joined.only("engine_step")) == (9, 18)
    joined.update(1)
    assert len(joined.spans) == 1
    assert joined.is_empty()


def test_a_step_of_which_nothing_more_is_heard_is_closed_in_the_end(joined: Joined) -> None:
    joined.schedule(1)
    joined.pass_seconds(601)
    assert times(joined.only("engine_step")) == (9, 9.5)
    assert joined.is_empty()


def test_the_end_of_the_engine_closes_its_steps(joined: Joined) -> None:
    joined.schedule(1)
    joined.schedule(2)
    joined.run(1)
    joined.joiner.part(joined.engine)
    assert [times(span) for span in joined.named("engine_step")] == [(9, 18)]
    joined.run(2)  # was still in the worker's socket
    assert [times(span) for span in joined.named("engine_step")] == [(9, 18), (19, 28)]
    assert joined.is_empty()


def test_ranks_whose_engine_is_on_another_host_are_forgotten_silently(joined: Joined) -> None:
    for number in range(1, 101):
        joined.run(number)
    assert joined.joiner.waiting
    joined.pass_seconds(2.1)
    assert joined.is_empty()
    assert joined.spans == []
    assert joined.drops.take_line() == ""


def test_a_step_of_a_plain_program_waits_for_no_engine(joined: Joined) -> None:
    joined.run(1, rank=-1)
    assert joined.is_empty()


def test_an_output_of_a_step_that_nobody_knows_is_nothing(joined: Joined) -> None:
    joined.update(7, {1: 1}, finished=[1])
    assert joined.spans == []
    assert joined.is_empty()


def test_a_flush_waits_for_no_rank_but_ends_no_step_that_runs(joined: Joined) -> None:
    joined.schedule(1, ranks=2)
    joined.run(1)
    joined.update(1)
    joined.schedule(2, ranks=2)
    joined.joiner.flush()
    assert attributes(joined.only("engine_step"))["npu.step.number"] == 1


def test_draining_ends_every_step(joined: Joined) -> None:
    joined.schedule(1)
    joined.run(2)  # its engine is not known
    joined.joiner.drain()
    assert times(joined.only("engine_step")) == (9, 9.5)
    assert joined.is_empty()


def test_engines_have_their_own_steps(joined: Joined) -> None:
    other = joined.client(pid=99)
    joined.schedule(1)
    first, joined.engine = joined.engine, other
    joined.schedule(2)
    joined.run(2)
    joined.update(2)  # says nothing of the other engine's step
    assert [attributes(span)["npu.step.number"] for span in joined.spans] == [2]
    joined.engine = first
    joined.run(1)
    joined.update(1)
    assert [span.resource.attributes["process.pid"] for span in joined.spans] == [99, 1]


@pytest.mark.slow
def test_nothing_is_kept_of_100000_steps(joined: Joined) -> None:
    for number in range(1, 100_001):
        joined.schedule(number, trace_id=b"")
        joined.run(number, trace_id=b"", span_id=b"", stages=[])
        joined.update(number)
    assert joined.is_empty()


def test_ids_are_those_that_the_engine_chose(joined: Joined) -> None:
    joined.schedule(1, span_id=id_of(77), trace_id=b"e" * 16)
    joined.run(1, parent_span_id=id_of(77))
    joined.update(77)
    span = joined.only("engine_step")
    assert (span_id(span), trace_id(span)) == (77, int.from_bytes(b"e" * 16, "big"))


# Kept after the fact


def reasons(joined: Joined) -> dict[str, list[str]]:
    """By the spans' names."""
    found: dict[str, list[str]] = {}
    for span in joined.spans:
        reason = attributes(span).get("npu.sampled.reason")
        if reason is not None:
            found.setdefault(span.name, []).append(reason)
    return found


def test_a_step_that_turned_out_slow_is_kept_with_all_its_ranks(joined: Joined) -> None:
    joined.open(7)
    joined.schedule(1, {7: 1}, ranks=3, kept=False)
    assert joined.run(1, rank=0, kept=False) == []
    assert joined.run(1, rank=1, kept=False) == []
    joined.update(1, keep="slow")
    late = joined.run(1, rank=2, kept=False)
    assert attributes(late[-1])["npu.sampled.reason"] == "slow"
    assert reasons(joined) == {"worker_step": ["slow", "slow"], "engine_step": ["slow"]}
    assert {span.resource.attributes["process.pid"] for span in joined.named("worker_step")} == {10, 11}
    assert [link.context.span_id for link in joined.only("engine_step").links] == [7]
    assert len({trace_id(span) for span in [*joined.spans, *late]}) == 1


def test_a_step_that_did_not_is_not(joined: Joined) -> None:
    joined.schedule(1, kept=False)
    assert joined.run(1, kept=False) == []
    joined.update(1)
    assert joined.spans == []
    assert joined.is_empty()


def test_a_worker_on_another_host_hears_of_it_with_a_later_step(joined: Joined) -> None:
    assert joined.run(1, kept=False) == []
    joined.joiner.take(joined.client(), frames.Keep("slow", [id_of(1), id_of(2)]))
    assert reasons(joined) == {"worker_step": ["slow"]}
    assert attributes(joined.run(2, kept=False)[-1])["npu.sampled.reason"] == "slow"
    joined.pass_seconds(2)
    assert joined.is_empty()


def test_there_a_step_is_held_for_two_seconds(joined: Joined) -> None:
    joined.run(1, kept=False)
    joined.pass_seconds(1.9)
    joined.run(2, kept=False)
    joined.pass_seconds(0.2)
    joined.joiner.take(joined.client(), frames.Keep("slow", [id_of(1), id_of(2)]))
    assert [attributes(span)["npu.step.number"] for span in joined.named("worker_step")] == [2]


def test_there_steps_are_held_in_bounded_memory_and_the_others_counted(
    joined: Joined, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joiner, "HELD_STAGES", 30)  # of 3 a step
    for number in range(1, 15):
        joined.run(number, kept=False)
    joined.schedule(13)  # what its engine tells of is not held for this
    joined.run(15, kept=False)
    assert len(joined.joiner._steps) == 11
    assert joined.drops.totals() == {"too_many_held": 4}
    joined.joiner.take(joined.client(), frames.Keep("slow", [id_of(number) for number in range(1, 16)]))
    assert len(joined.named("worker_step")) == 11


def test_there_a_worker_that_sends_steps_without_end_costs_others_none_of_theirs(
    joined: Joined, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joiner, "HELD_STAGES", 30)  # of 3 a step
    joined.run(1, kept=False)
    for number in range(100, 150):
        joined.run(number, rank=1, kept=False)
    joined.run(2, kept=False)
    assert joined.drops.totals() == {"too_many_held": 42}
    joined.joiner.take(joined.client(), frames.Keep("slow", [id_of(1), id_of(2)]))
    assert [attributes(span)["npu.step.number"] for span in joined.named("worker_step")] == [1, 2]


def test_there_a_rank_that_tells_of_a_step_twice_is_forgotten_whole(joined: Joined) -> None:
    joined.run(1, kept=False)
    joined.run(1, kept=False)
    joined.pass_seconds(3)
    assert joined.joiner._strangers.stages == 0
    assert joined.is_empty()


def test_a_rank_with_an_error_keeps_the_step_on_every_rank(joined: Joined) -> None:
    joined.schedule(1, ranks=2, kept=False)
    joined.run(1, rank=0, kept=False)
    spans = joined.run(1, rank=1, kept=False, error="RuntimeError")
    assert attributes(spans[-1])["npu.sampled.reason"] == "error"
    joined.update(1)
    assert reasons(joined) == {"worker_step": ["error"], "engine_step": ["error"]}


def test_a_step_that_hung_is_kept(joined: Joined) -> None:
    joined.schedule(1, kept=False)
    joined.joiner.keep(id_of(1), "hang")
    assert attributes(joined.run(1, kept=False)[-1])["npu.sampled.reason"] == "hang"
    joined.update(1)
    assert reasons(joined) == {"engine_step": ["hang"]}
