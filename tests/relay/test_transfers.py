"""KV cache from elsewhere in a request's trace, and what a request or step got for nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from opentelemetry.trace import StatusCode

from tests.helpers.joined import MS, Joined, attributes, parent_id, times

if TYPE_CHECKING:
    from otel_npu.drops import Drops


@pytest.fixture
def joined() -> Joined:
    return Joined()


def test_a_request_that_waits_for_its_kv_cache_has_that_wait_between_queue_and_prefill(joined: Joined) -> None:
    joined.open(1)  # at 1 ms
    joined.move(3, loading=[1], tokens=[48])
    joined.move(303, loaded=[1])
    joined.step(31, 1, prefill=True)
    joined.step(32, 1, finished=[1])
    joined.end(1, 2)
    queue, load, prefill = (joined.only(name) for name in ("queue", "kv_load", "prefill"))
    assert (times(queue), times(load), times(prefill)) == ((1, 3), (3, 303), (310, 318))
    assert parent_id(load) == 1
    assert attributes(load) == {
        "npu.kv.tokens": 48,
        "npu.kv.connector": "Connector",
        "npu.timing": "host",
        "gen_ai.request.id": "cmpl-1",
    }
    assert load.status.status_code is StatusCode.UNSET
    assert joined.is_empty()


def test_a_load_that_failed_is_marked_and_the_next_try_is_a_span_of_its_own(joined: Joined) -> None:
    joined.open(1)
    joined.move(3, loading=[1], tokens=[48])
    joined.move(4, loaded=[1], failed=[1])
    joined.move(5, loading=[1], tokens=[16])
    joined.move(6, loaded=[1])
    joined.step(1, 1, prefill=True, finished=[1])
    joined.end(1, 1)
    failed, again = joined.named("kv_load")
    assert (times(failed), times(again)) == ((3, 4), (5, 6))
    assert failed.status.status_code is StatusCode.ERROR
    assert attributes(failed)["error.type"] == "kv_load_failed"
    assert again.status.status_code is StatusCode.UNSET


@pytest.mark.parametrize("reason", ["abort", "error"])
def test_a_load_during_which_the_request_ends_ends_with_it_and_says_how(joined: Joined, reason: str) -> None:
    joined.open(1)
    joined.move(3, loading=[1], tokens=[48])
    joined.schedule(1, total_tokens=0, ended=[1], opened_ns=8 * MS)
    joined.end(1, 0, reason, at_ms=7)
    load = joined.only("kv_load")
    assert times(load) == (3, 7)
    assert attributes(load)["error.type"] == reason
    assert times(joined.only("queue")) == (1, 3)
    assert joined.is_empty()


def test_a_load_inside_a_step_that_failed_is_an_event_of_the_phase(joined: Joined) -> None:
    joined.open(1)
    joined.step(1, 1, prefill=True)
    joined.move(19, failed=[1])
    joined.step(2, 1, prefill=True, finished=[1])
    joined.end(1, 2)
    [event] = joined.only("prefill").events
    assert event.name == "kv_load_failed"
    assert joined.named("kv_load") == []


def test_what_is_kept_for_somebody_else_is_a_span_once_it_is_free_although_the_request_is_long_over(
    joined: Joined,
) -> None:
    joined.open(1)
    joined.move(19, sending=[1])
    joined.step(1, 1, prefill=True, finished=[1])
    joined.end(1, 1)
    assert joined.named("prefill")
    assert joined.named("kv_send") == []
    joined.pass_seconds(30)
    joined.move(30_000, sent=[1, 77])
    send = joined.only("kv_send")
    assert times(send) == (19, 30_000)
    assert parent_id(send) == 1
    assert attributes(send)["gen_ai.request.id"] == "cmpl-1"
    assert attributes(send)["npu.kv.connector"] == "Connector"
    assert joined.is_empty()


def test_what_nobody_has_fetched_when_the_engine_ends_is_counted(joined: Joined) -> None:
    joined.open(1)
    joined.move(19, sending=[1])
    joined.step(1, 1, prefill=True, finished=[1])
    joined.end(1, 1)
    joined.joiner.part(joined.engine)
    assert taken(joined.drops) == {"request_unfinished": 1}


def taken(drops: Drops) -> dict[str, int]:
    return drops.take_unsent()


def test_a_request_says_what_the_caches_had_of_its_prompt_and_so_does_the_step(joined: Joined) -> None:
    joined.open(1)
    found = {"first": [1], "cached": [32], "fetched": [16], "total_cached": 96, "total_fetched": 16}
    joined.schedule(1, {1: 5}, prefill=True, **found)
    joined.run(1)
    joined.update(1, {1: 1})
    joined.step(2, 1, finished=[1])
    joined.end(1, 2)
    said = attributes(joined.only("prefill"))
    assert said["gen_ai.usage.cache_read.input_tokens"] == 48
    assert said["npu.request.fetched_tokens"] == 16
    assert "gen_ai.usage.cache_read.input_tokens" not in attributes(joined.only("decode"))
    first, second = joined.named("engine_step")
    assert attributes(first)["npu.step.cached_tokens"] == 96
    assert attributes(first)["npu.step.fetched_tokens"] == 16
    assert "npu.step.cached_tokens" not in attributes(second)


def test_drafted_and_accepted_tokens_add_up_over_a_requests_steps(joined: Joined) -> None:
    joined.open(1, 2)
    joined.step(1, 1, 2, prefill=True)
    for number in (2, 3):
        joined.schedule(number, {1: 4, 2: 4})
        joined.run(number)
        drafts = {"drafted": [3, 3], "accepted": [2, 0], "total_drafted": 9, "total_accepted": 4}
        joined.update(number, {1: 3, 2: 1}, finished=[1, 2] if number == 3 else [], **drafts)
    joined.end(1, 7)
    joined.end(2, 3)
    told = [attributes(span) for span in joined.named("decode")]
    assert [said["npu.request.drafted_tokens"] for said in told] == [6, 6]
    assert [said["npu.request.accepted_tokens"] for said in told] == [4, 0]
    steps = [attributes(span) for span in joined.named("engine_step")]
    assert [said.get("npu.step.drafted_tokens") for said in steps] == [None, 9, 9]
    assert [said.get("npu.step.accepted_tokens") for said in steps] == [None, 4, 4]
