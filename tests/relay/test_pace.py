"""How often the relay looks: rarely, unless much comes, and not at all where nothing does."""

from __future__ import annotations

import itertools

from otel_npu.relay.pace import FIRST_SECONDS, LONGEST_SECONDS, PACKETS_A_LOOK, SHORTEST_SECONDS, Pace


def test_where_nothing_comes_it_waits_to_be_woken() -> None:
    assert Pace().pause(0) is None


def test_a_packet_that_comes_alone_makes_it_look_for_no_more() -> None:
    now = itertools.count(step=1.0)  # each ping of an idle worker a second after the one before
    pace = Pace(now.__next__)
    assert [pace.pause(1) for _ in range(3)] == [None, None, None]
    assert Pace(now.__next__).pause(2) == FIRST_SECONDS * 1.25


def test_after_packets_it_looks_a_few_times_more_and_then_waits() -> None:
    pace = Pace()
    pace.pause(1)
    pace.pause(1)
    pauses = [pace.pause(0) for _ in range(5)]
    assert all(FIRST_SECONDS <= (pause or 0.0) < LONGEST_SECONDS for pause in pauses[:3])
    assert pauses[3:] == [None, None]
    assert (pace.pause(2) or 1.0) < FIRST_SECONDS * 2  # and begins anew


def test_a_look_finds_about_as_many_packets_however_many_come() -> None:
    for a_second in (200, 1000):
        pace = Pace()
        seconds = pace.pause(2) or 0.0
        for _ in range(20):
            seconds = pace.pause(max(1, round(a_second * seconds))) or 0.0
        assert 0.5 < a_second * seconds / PACKETS_A_LOOK < 2


def test_it_looks_neither_all_the_time_nor_too_late() -> None:
    pace = Pace()
    assert [pace.pause(100_000) for _ in range(5)][-1] == SHORTEST_SECONDS
    pauses = [pace.pause(1) or 0.0 for _ in range(60)]
    assert pauses == sorted(pauses)  # whoever has just begun is not left alone for long
    assert pauses[-1] == LONGEST_SECONDS
