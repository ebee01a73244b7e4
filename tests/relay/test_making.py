"""Spans are made when there is time: what gives way are the traces of steps, and never without a count."""

from __future__ import annotations

import gc
import itertools
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any

import pytest

from otel_npu import semconv
from otel_npu.drops import Drops
from otel_npu.relay import making as making_module
from otel_npu.relay.account import Account
from otel_npu.relay.ledger import CROWDED_BYTES, LITTLE_BYTES
from otel_npu.relay.making import Making, Unmade
from tests.helpers.joined import Joined

if TYPE_CHECKING:
    from collections.abc import Sequence

    from opentelemetry.sdk.trace import ReadableSpan


class Export:
    """Keeps what it gets."""

    def __init__(self) -> None:
        self.spans: list[Any] = []

    def put(self, spans: Sequence[ReadableSpan], _account: Account) -> None:
        self.spans += spans


class Made:
    """A making, the exporter behind it, and what it counts."""

    def __init__(self) -> None:
        self.export: Any = Export()
        self.drops = Drops()
        self.account = Account()
        self.making = Making(lambda: self.export, self.drops)

    def put(self, *names: str, gives_way: int = 0, account: Account | None = None) -> None:
        spans: Any = names
        self.making.put(Unmade(lambda: spans, gives_way=gives_way), account or self.account)


@pytest.fixture
def made() -> Made:
    return Made()


def test_nothing_is_made_before_there_is_time(made: Made) -> None:
    made.making.load()
    made.put("a")
    assert made.making.waiting
    assert made.export.spans == []
    made.making.some(1.0)
    assert made.export.spans == ["a"]
    assert not made.making.waiting


def test_others_that_have_the_processor_take_none_of_the_time_for_making(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "monotonic", itertools.count(step=10.0).__next__)  # each look at it is late
    made.making.load()
    for name in "abc":
        made.put(name)
    made.making.some(1.0)
    assert made.export.spans == ["a", "b", "c"]


def test_what_comes_before_the_exporter_is_there_waits_for_it(made: Made) -> None:
    made.put("a")
    made.making.some(1.0)
    assert not made.making.waiting  # nothing could be made
    exporter: Any = made.making.all()
    assert exporter is made.export
    assert made.export.spans == ["a"]


def test_the_exporter_is_made_beside_what_else_is_done(made: Made) -> None:
    loading, loaded = threading.Event(), threading.Event()

    def load() -> Any:
        loading.set()
        assert loaded.wait(30)
        return made.export

    making = Making(load, made.drops)
    making.load_beside()
    assert loading.wait(30)
    assert making.export is None
    loaded.set()
    assert making.all() is made.export


def test_where_no_thread_can_be_started_it_is_made_all_the_same(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    made.making.load_beside()
    assert made.making.export is made.export


def test_requests_go_before_the_traces_of_steps(made: Made) -> None:
    made.put("step", gives_way=1)
    made.put("request")
    made.making.all()
    assert made.export.spans == ["request", "step"]


def test_the_oldest_traces_give_way_and_requests_never(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(making_module, "MAX_TRACE_SPANS", 4)
    made.put("request")
    for number in range(5):
        made.put(f"step {number}", f"stage {number}", gives_way=2)
    made.making.all()
    assert made.export.spans == ["request", "step 3", "stage 3", "step 4", "stage 4"]
    assert made.drops.take_unsent() == {semconv.RELAY_BUSY: 3}
    assert made.account.lost == 6


def test_for_a_clients_frames_its_own_traces_give_way_or_those_of_one_of_whom_more_is_held(made: Made) -> None:
    little, much = Account(), Account()
    little.held_bytes, much.held_bytes = CROWDED_BYTES - 1, CROWDED_BYTES
    made.put("a", gives_way=1, account=little)
    made.put("b", gives_way=1, account=much)
    assert made.making.give_way(much)
    assert not made.making.give_way(much)  # it has none any more, and takes none of who has less
    made.put("c", gives_way=1, account=much)
    assert made.making.give_way(made.account)
    made.making.all()
    assert made.export.spans == ["a"]
    assert (little.lost, much.lost) == (0, 2)


def test_for_an_engines_frames_the_traces_of_its_workers_give_way_but_not_of_whom_little_is_held(made: Made) -> None:
    """The engine has no traces that could, because requests are none: the steps of its workers may be all that wait."""
    engine, worker, small = Account(), Account(), Account()
    engine.held_bytes, worker.held_bytes, small.held_bytes = CROWDED_BYTES - 1, LITTLE_BYTES + 1, LITTLE_BYTES
    made.put("a", gives_way=1, account=small)
    made.put("b", gives_way=1, account=worker)
    assert made.making.give_way(engine)
    assert not made.making.give_way(engine)
    made.making.all()
    assert made.export.spans == ["a"]


def test_what_is_given_up_lets_go_of_what_it_would_have_been_made_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """At once: till the garbage collector comes, it would all still be on the ledger, and more would be given up."""
    joined = Joined()
    waiting: list[Unmade] = []
    monkeypatch.setattr(joined.joiner, "_put", lambda spans, _: waiting.append(spans))
    joined.open(1, 2)
    joined.schedule(1, {1: 1, 2: 1}, prefill=True)
    held: list[weakref.ref[Any]] = [weakref.ref(step.scheduled) for step in joined.joiner.steps()]
    held += [weakref.ref(request) for _, request in joined.joiner.open_requests()]
    gc.disable()
    try:
        joined.run(1)
        joined.update(1, {1: 1, 2: 1}, finished=[1])
        joined.end(1, 1)
        joined.joiner.part(joined.engine)  # 2 is unfinished
        joined.pass_seconds(10)
        assert len(waiting) == 2
        for spans in waiting:
            spans.give_up()
        waiting.clear()
        assert [ref() for ref in held] == [None] * 3
    finally:
        gc.enable()


def test_traces_are_made_by_turns(made: Made) -> None:
    other = Account()
    for number in range(3):
        made.put(f"flood {number}", gives_way=1)
    made.put("step 0", gives_way=1, account=other)
    made.put("step 1", gives_way=1, account=other)
    made.making.all()
    assert made.export.spans == ["flood 0", "step 0", "flood 1", "step 1", "flood 2"]


def test_where_too_many_requests_wait_who_has_most_loses_the_oldest(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(making_module, "MAX_REQUESTS", 3)
    other = Account()
    made.put("request", account=other)
    for number in range(5):
        made.put(f"flood {number}")
    made.making.all()
    assert made.export.spans == ["request", "flood 3", "flood 4"]
    assert (other.lost, made.account.lost) == (0, 3)


def test_spans_that_can_not_be_made_cost_no_others(made: Made) -> None:
    def fail() -> Any:
        raise ZeroDivisionError

    made.making.put(Unmade(fail), made.account)
    made.put("a")
    made.making.all()
    assert made.export.spans == ["a"]
    assert made.drops.take_unsent() == {semconv.INTERNAL_ERROR: 1}
    assert made.account.lost == 1


def test_they_are_made_once(made: Made) -> None:
    calls: list[int] = []
    spans = Unmade(lambda: calls.append(1) or [])  # type: ignore[func-returns-value]
    assert (list(spans), len(spans), calls) == ([], 0, [1])
