"""What waits for an exporter is tried again, in bounded memory, until it is taken, refused or too old."""

from __future__ import annotations

import random
from typing import Any

import pytest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import SpanContext

from otel_npu.relay.account import Account
from otel_npu.relay.batches import Batch, Delivery, Load
from otel_npu.relay.destination import (
    FIRST_WAIT_SECONDS,
    GIVE_UP_SECONDS,
    LONGEST_WAIT_SECONDS,
    MOST_AT_ONCE,
    SLOW_SECONDS,
    Bounds,
    Destination,
)
from otel_npu.relay.encoding import encode_request, encode_span
from otel_npu.relay.links import Links
from otel_npu.relay.otlp import OtlpExporter
from otel_npu.relay.otlp_settings import OtlpSettings
from otel_npu.relay.outcomes import Later, Never, Outcome, Taken, TooLarge

RESOURCE = Resource({"service.name": "vllm"})
TAKEN = Taken()
AWAY = Later("UNAVAILABLE: nobody there")
REFUSED = Never("UNAUTHENTICATED: who are you?")
MANY = 1 << 40


class Exporter(OtlpExporter):
    """Nothing is sent: what became of it is said by the test."""

    def send(self, body: bytes, timeout_seconds: float) -> Outcome:
        raise AssertionError

    def shutdown(self) -> None:
        pass


class Bench:
    """One destination on a fake clock, and what has become of its batches."""

    def __init__(self, size: int = MANY, spans: int = MANY) -> None:
        self.now = 1000.0
        self.lost: dict[str, int] = {}
        self.settled = 0
        self.account = Account()
        exporter = Exporter(OtlpSettings("grpc", "collector:4317", secure=False))
        draw = random.Random(0).uniform
        self.destination = Destination(exporter, Bounds(size, spans), lambda: self.now, draw)

    def offer(self, count: int = 10, text: str = "") -> None:
        """A batch of so many spans."""
        batch = Batch(1, self.now, self._settled)
        context = SpanContext(random.getrandbits(127) + 1, random.getrandbits(63) + 1, is_remote=False)
        names = (f"span{number}" for number in range(count))
        spans = [
            ReadableSpan(name, context, None, RESOURCE, {"text": text}, start_time=1, end_time=2) for name in names
        ]
        batch.add(self.account, spans, [encode_span(span) for span in spans], keep=False)
        self.destination.offer(batch, batch.request.encode())

    def _settled(self, batch: Batch) -> None:
        self.settled += batch.count
        for reason, count in batch.lost.items():
            self.lost[reason] = self.lost.get(reason, 0) + count

    def take(self) -> Load:
        load = self.destination.take()
        assert load is not None
        return load

    def next(self) -> Load:
        """The next load, as soon as the clock allows."""
        self.now += max(0.0, self.destination.pause())
        return self.take()

    def pack(self) -> None:
        for load in self.destination.unpacked():
            self.destination.pack(load, load.packing())


# Trying again


def test_what_is_taken_is_dealt_with() -> None:
    bench = Bench()
    bench.offer()
    bench.destination.done(bench.take(), TAKEN)
    assert (bench.settled, bench.lost, bench.destination.left) == (10, {}, 0)


def test_what_may_come_later_is_tried_again_ever_more_rarely_and_with_jitter() -> None:
    bench = Bench()
    bench.offer()
    waits = []
    while bench.now < 1000 + 100:
        bench.destination.done(bench.take(), AWAY)
        waits.append(bench.destination.pause())
        bench.now += waits[-1]
    assert waits[0] <= FIRST_WAIT_SECONDS * 1.2
    assert max(waits) <= LONGEST_WAIT_SECONDS * 1.2 < 10  # spans again within 10 s of its return
    assert len(set(waits[-10:])) == 10
    assert 15 < len(waits) < 35
    assert (bench.settled, bench.lost) == (0, {})
    bench.destination.done(bench.take(), TAKEN)
    assert (bench.settled, bench.lost) == (10, {})


def test_the_waits_begin_anew_when_it_is_back() -> None:
    bench = Bench()
    bench.offer()
    for _ in range(10):
        bench.destination.done(bench.next(), AWAY)
    bench.destination.done(bench.next(), TAKEN)
    bench.offer()
    bench.destination.done(bench.take(), AWAY)
    assert bench.destination.pause() <= FIRST_WAIT_SECONDS * 1.2


def test_after_five_minutes_a_batch_is_given_up_and_counted_once_and_younger_ones_are_not() -> None:
    bench = Bench()
    bench.offer(10)
    bench.destination.done(bench.next(), AWAY)
    bench.now += GIVE_UP_SECONDS / 2
    bench.offer(7)
    while not bench.settled:
        bench.destination.done(bench.next(), AWAY)
    assert GIVE_UP_SECONDS <= bench.now - 1000 < GIVE_UP_SECONDS + 2 * LONGEST_WAIT_SECONDS
    assert bench.lost == {"export_failed": 10}
    bench.destination.done(bench.next(), TAKEN)
    assert (bench.settled, bench.lost) == (17, {"export_failed": 10})


@pytest.mark.parametrize("seconds", [3.0, 30.0])
def test_the_receiver_says_when_to_come_again(seconds: float) -> None:
    bench = Bench()
    bench.offer()
    bench.offer()
    bench.destination.done(bench.take(), Later("RESOURCE_EXHAUSTED: slow down", seconds))
    assert bench.destination.pause() == pytest.approx(seconds)
    bench.destination.hurry()  # a flush doesn't change its mind
    assert bench.destination.pause() == pytest.approx(seconds)
    assert bench.destination.take() is None
    bench.now += seconds
    bench.destination.done(bench.take(), TAKEN)
    bench.destination.done(bench.take(), TAKEN)
    assert bench.lost == {}


def test_it_may_not_ask_for_more_than_a_batch_is_tried() -> None:
    bench = Bench()
    bench.offer()
    bench.destination.done(bench.take(), Later("429 Too Many Requests", 86_400))
    assert bench.destination.pause() == GIVE_UP_SECONDS


def test_what_will_never_be_taken_is_lost_at_once_and_counted_once() -> None:
    bench = Bench()
    bench.offer(10)
    bench.offer(5)
    bench.destination.done(bench.take(), REFUSED)
    assert (bench.settled, bench.lost) == (10, {"export_refused": 10})
    bench.destination.done(bench.take(), TAKEN)
    assert (bench.settled, bench.lost) == (15, {"export_refused": 10})


def test_spans_that_are_rejected_are_counted_as_that_but_never_more_than_there_are() -> None:
    bench = Bench()
    bench.offer(10)
    bench.destination.done(bench.take(), Taken(rejected=3, message="quota"))
    assert bench.lost == {"export_rejected": 3}
    bench.offer(10)
    bench.destination.done(bench.take(), Taken(rejected=1000))
    assert (bench.settled, bench.lost) == (20, {"export_rejected": 13})


def test_a_batch_that_always_fails_does_not_keep_the_others_back() -> None:
    bench = Bench()
    for count in (1, 2, 3):
        bench.offer(count)
    taken: list[int] = []
    while len(taken) < 2:
        load = bench.next()
        bench.destination.done(load, AWAY if load.count == 1 else TAKEN)
        if load.count > 1:
            taken.append(load.count)
    assert taken == [2, 3]


def test_what_is_too_large_at_once_goes_in_halves() -> None:
    bench = Bench()
    bench.offer(11)
    sizes = []
    while bench.destination.left:
        load = bench.next()
        sizes.append(load.count)
        bench.destination.done(load, TooLarge("413: too large") if load.count > 3 else TAKEN)
    assert sorted(size for size in sizes if size <= 3) == [2, 3, 3, 3]
    assert (bench.settled, bench.lost) == (11, {})
    assert bench.destination.most_bytes is not None


def test_halves_hold_every_span_once_in_order_with_its_resource() -> None:
    bench = Bench()
    bench.offer(5)
    load = bench.take()
    first, second = (half.body for half in load.halves())
    assert load.body.startswith(b"\x0a")
    assert [first.count(b"span%d" % number) + second.count(b"span%d" % number) for number in range(5)] == [1] * 5
    assert b"span1" in first
    assert b"span2" in second
    assert b"vllm" in first
    assert b"vllm" in second


def test_a_single_span_that_is_too_large_is_refused() -> None:
    bench = Bench()
    bench.offer(1)
    bench.destination.done(bench.take(), TooLarge("413: too large"))
    assert (bench.settled, bench.lost) == (1, {"export_refused": 1})


# At once


def test_a_slow_receiver_gets_more_than_one_at_a_time_but_not_many() -> None:
    bench = Bench()
    for _ in range(10):
        bench.offer()
    loads = [bench.take()]
    assert bench.destination.take() is None  # the first may be done in a moment
    for _ in range(MOST_AT_ONCE - 1):
        assert bench.destination.pause() == pytest.approx(SLOW_SECONDS)
        loads.append(bench.next())
    bench.now += 5
    assert bench.destination.take() is None
    bench.destination.done(loads[0], TAKEN)
    assert bench.destination.take() is not None


def test_while_it_is_away_one_at_a_time_is_enough() -> None:
    bench = Bench()
    for _ in range(10):
        bench.offer()
    bench.destination.done(bench.take(), AWAY)
    bench.next()
    bench.now += 5
    assert bench.destination.take() is None


def test_an_export_that_takes_too_long_is_left_and_tried_again_and_its_late_answer_counts_for_nothing() -> None:
    bench = Bench()
    bench.offer()
    load = bench.take()
    bench.now += 10.9
    assert bench.destination.leave_overdue() == 0
    bench.now += 0.2
    assert bench.destination.leave_overdue() == 1
    again = bench.next()
    assert again.body == load.body
    assert not bench.destination.done(load, REFUSED)
    assert bench.destination.left
    assert bench.destination.done(again, TAKEN)
    assert (bench.settled, bench.lost) == (10, {})


# Memory


def test_beyond_its_bytes_the_oldest_go_and_are_counted() -> None:
    bench = Bench(size=20_000)
    for count in range(1, 60):
        bench.offer(count)
        assert bench.destination._size <= 20_000 or len(bench.destination.waiting) == 1
    kept = [load.count for load in bench.destination.waiting]
    assert kept == list(range(kept[0], 60))
    assert bench.lost == {"queue_full": sum(range(1, kept[0]))}


def test_beyond_its_spans_too() -> None:
    bench = Bench(spans=25)
    for _ in range(5):
        bench.offer(10)
    assert [load.count for load in bench.destination.waiting] == [10, 10]
    assert bench.lost == {"queue_full": 30}


def test_what_has_to_wait_is_made_small_and_counted_as_small() -> None:
    bench = Bench(size=20_000)
    bench.offer(text="x" * 500)
    bench.destination.done(bench.take(), AWAY)
    for _ in range(30):  # 6 kB each
        bench.offer(text="x" * 500)
        bench.pack()
    assert len(bench.destination.waiting) == 31
    assert bench.lost == {}
    assert bench.destination._size == sum(load.size for load in bench.destination.waiting) < 20_000
    while bench.destination.left:
        load = bench.next()
        assert b"span9" in load.body
        bench.destination.done(load, TAKEN)
    assert bench.destination._size == bench.destination._spans == 0


def test_even_a_thousand_links_on_every_step_are_made_small() -> None:
    """The same requests are served again and again, but further back than zlib looks."""
    raw = [random.randbytes(24) + b"\1" for _ in range(1000)]
    context = SpanContext(1, 2, is_remote=False)
    made: dict[str, Any] = {"links": Links(None, raw), "resource": RESOURCE, "start_time": 1, "end_time": 2}
    body = encode_request(ReadableSpan("worker_step", context, **made) for _ in range(30))
    load = Load(Delivery(Batch(1, 0.0, lambda _: None)), 0.0, 30, body)
    load.pack(load.packing())
    assert load.size < len(body) / 20
    assert load.body == body


def test_what_is_under_way_is_not_touched() -> None:
    bench = Bench()
    bench.offer(text="x" * 500)
    load = bench.take()
    bench.destination.pack(load, load.packing())
    assert not load.packed


# The end


def test_at_the_end_nothing_is_held_back_any_more() -> None:
    bench = Bench()
    bench.offer()
    for _ in range(10):
        bench.destination.done(bench.next(), AWAY)
    bench.destination.end_by(bench.now + 5)
    assert bench.destination.pause() == 0
    bench.destination.done(bench.take(), AWAY)
    assert bench.destination.pause() <= FIRST_WAIT_SECONDS * 1.2
    assert not bench.destination.over
    bench.destination.give_up()
    assert (bench.settled, bench.lost) == (10, {"export_failed": 10})
    assert bench.destination.over


def test_it_is_over_at_once_if_the_receiver_will_not_take_anything_before_the_end() -> None:
    bench = Bench()
    bench.offer()
    bench.destination.done(bench.take(), Later("429", 60))
    assert not bench.destination.over
    bench.destination.end_by(bench.now + 5)
    assert bench.destination.over


def test_a_flush_tries_at_once_but_not_again_and_again() -> None:
    bench = Bench()
    bench.offer()
    for _ in range(10):
        bench.destination.done(bench.next(), AWAY)
    bench.destination.hurry()
    assert bench.destination.pause() > 2
    bench.now += 1.5
    bench.destination.hurry()
    assert bench.destination.pause() == 0


# What the log says


def test_an_outage_is_a_line_when_it_begins_one_a_minute_and_one_when_it_is_over(
    caplog: pytest.LogCaptureFixture,
) -> None:
    bench = Bench()
    while bench.now < 1000 + 130:
        bench.offer()
        if bench.destination.pause() <= 0:
            bench.destination.done(bench.take(), AWAY)
        bench.destination.tick()
        bench.now += 1
    while bench.destination.left:
        bench.destination.done(bench.next(), TAKEN)
    began, after_one, after_two, back = (record.getMessage() for record in caplog.records)
    assert began == (
        "collector:4317 takes no spans: UNAVAILABLE: nobody there; "
        f"they wait here, for 5 minutes and in {MANY / 1e6:.0f} MB at most"
    )
    assert "has taken no spans for 6" in after_one
    assert "UNAVAILABLE: nobody there; 6" in after_one
    assert after_one.endswith("MB, 0 were lost")
    assert "has taken no spans for 12" in after_two
    assert back.startswith("collector:4317 takes spans again after 13")
    assert back.endswith("s; no span was lost")
    assert {record.name for record in caplog.records} == {"otel_npu.relay"}


def test_a_try_that_fails_alone_is_no_line(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench()
    for _ in range(100):
        bench.offer()
        bench.destination.done(bench.next(), AWAY)
        bench.destination.done(bench.next(), TAKEN)
        bench.destination.tick()
    assert caplog.records == []


def test_refusals_are_one_line_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench()
    for _ in range(120):
        bench.offer()
        bench.destination.done(bench.next(), REFUSED)
        bench.now += 1
    assert [record.getMessage() for record in caplog.records] == [
        "collector:4317 refuses spans: UNAUTHENTICATED: who are you?; 10 of them are lost"
    ] * 2


def test_what_was_lost_meanwhile_is_said_when_it_is_back(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench(spans=30)
    bench.offer()
    for _ in range(3):
        bench.destination.done(bench.next(), AWAY)
    for _ in range(5):
        bench.offer()
    bench.destination.done(bench.next(), TAKEN)
    assert caplog.records[-1].getMessage().endswith("; 30 spans were lost")


def test_if_it_ends_before_a_second_try_that_is_said_too(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench()
    bench.offer()
    bench.destination.done(bench.next(), AWAY)
    bench.destination.give_up()
    assert "takes no spans: UNAVAILABLE: nobody there" in caplog.text
