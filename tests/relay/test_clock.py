"""The map from device time to host time: what it proves, and that it holds."""

from __future__ import annotations

import gc
import math
import random
import tracemalloc
from fractions import Fraction
from itertools import combinations
from typing import TYPE_CHECKING, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.clock_error import HOST_START_NS, MS, US, S, drifting, engine, figures, place
from otel_npu.relay import clock as clock_module
from otel_npu.relay.clock import RATE_LIMIT, WANDER_PER_NS, DeviceClock, Placement

if TYPE_CHECKING:
    from collections.abc import Callable

DAY = 86_400 * S


def line(ppm: float, device_start: int, host_start: int) -> Callable[[int], int]:
    """The true host time of a device time, for clocks of constant rates."""
    rate = Fraction(round(ppm * 1000), 10**9)
    return lambda device_ns: host_start + (device_ns - device_start) + round((device_ns - device_start) * rate)


def placed(clock: DeviceClock, device_ns: int, near_host_ns: int | None = None) -> Placement:
    placement = clock.at(device_ns, near_host_ns)
    assert placement is not None
    return placement


def covers(placement: Placement, true_ns: int) -> bool:
    return abs(placement.host_ns - true_ns) <= placement.uncertainty_ns


def bracket(clock: DeviceClock, device_ns: int, true_ns: int, before: int = 20 * US, after: int = 30 * US) -> None:
    clock.lower(device_ns, true_ns - before)
    clock.upper(device_ns, true_ns + after)


def feed(clock: DeviceClock, host: Callable[[int], int], start_ns: int, seconds: int, per_second: int = 10) -> int:
    """Good brackets for some seconds; returns the device time after them."""
    for i in range(seconds * per_second):
        device_ns = start_ns + i * S // per_second
        bracket(clock, device_ns, host(device_ns))
    return start_ns + seconds * S


# What is proven

# At least 1 ns: the true times here are rounded to nanoseconds, and a bound must not be wrong by that.
latencies = st.one_of(st.integers(1, 50 * MS), st.integers(1, 100 * US), st.just(1), st.integers(1, 2 * US))


class Bound(NamedTuple):
    after_ns: int
    """Device time since the one before; negative if it comes out of order."""
    lower_latency: int | None
    upper_latency: int | None


bounds = st.lists(
    st.builds(
        Bound,
        st.one_of(st.integers(0, 2 * S), st.integers(-300 * MS, 50 * MS), st.integers(0, 200 * S)),
        st.none() | latencies,
        st.none() | latencies,
    ),
    min_size=1,
    max_size=60,
)
drifts = st.one_of(st.floats(-150, 150), st.sampled_from([0.0, 5.0, -5.0, 50.0, 150.0, -150.0, 199.9]))
starts = st.integers(0, 40 * DAY)


@pytest.mark.slow
@given(bounds, drifts, starts, starts, st.sampled_from([0, 20, 1000]))
@settings(max_examples=300)
def test_the_truth_is_within_the_uncertainty_which_is_never_negative(
    bounds: list[Bound], ppm: float, device_start: int, host_start: int, resolution: int
) -> None:
    host = line(ppm, device_start, host_start)
    clock, device_ns = DeviceClock(resolution), device_start + 10 * S
    for after, lower, upper in bounds:
        device_ns += after
        reading = device_ns // (resolution or 1) * (resolution or 1)
        if lower is not None:
            clock.lower(reading, host(device_ns) - lower)
        if upper is not None:
            clock.upper(reading, host(device_ns) + upper)
        for query in (device_ns, device_ns - 3 * S, device_ns + 100 * MS, device_ns + 60 * S):
            placement = clock.at(query // (resolution or 1) * (resolution or 1))
            if placement is not None:
                assert placement.uncertainty_ns >= 0
                assert covers(placement, host(query))
    assert clock.resets == 0


@pytest.mark.slow
@given(bounds, st.lists(st.floats(-1, 1), min_size=20, max_size=20), st.floats(-150, 150), starts)
@settings(max_examples=300)
def test_the_truth_stays_within_while_the_oscillator_wanders_by_up_to_its_limit(
    bounds: list[Bound], pushes: list[float], ppm: float, device_start: int
) -> None:
    """The rate goes up or down for ten seconds at a time, as fast as is allowed, within its own limit."""
    knots = [(0.0, ppm * 1e-6)]
    slopes = []
    span = 10 * S
    for push in pushes * 70:  # 14000 s, more than 60 bounds can take
        offset, rate = knots[-1]
        slope = push * WANDER_PER_NS
        if abs(rate + slope * span) > RATE_LIMIT:
            slope = 0.0
        slopes.append(slope)
        knots.append((offset + rate * span + slope / 2 * span * span, rate + slope * span))

    def host(device_ns: int) -> int:
        index, within = divmod(device_ns - device_start, span)
        offset, rate = knots[index]
        return 7 * DAY + device_ns + round(offset + rate * within + slopes[index] / 2 * within * within)

    clock, device_ns = DeviceClock(), device_start + 100 * S
    for after, lower, upper in bounds:
        device_ns += after
        if lower is not None:
            clock.lower(device_ns, host(device_ns) - lower)
        if upper is not None:
            clock.upper(device_ns, host(device_ns) + upper)
        for query in (device_ns, device_ns - 3 * S, device_ns + 100 * MS):
            placement = clock.at(query)
            assert placement is None or covers(placement, host(query))
    assert clock.resets == 0


@given(bounds, drifts, st.lists(st.integers(0, 10 * S), min_size=2, max_size=20))
def test_places_keep_the_order_of_device_times(bounds: list[Bound], ppm: float, queries: list[int]) -> None:
    host = line(ppm, 0, DAY)
    clock, device_ns = DeviceClock(), 100 * S
    bracket(clock, device_ns, host(device_ns))
    for after, lower, upper in bounds:
        device_ns += after
        clock.lower(device_ns, host(device_ns) - (lower or 1))
        clock.upper(device_ns, host(device_ns) + (upper or 1))
    places = [placed(clock, device_ns - 5 * S + query).host_ns for query in sorted(queries)]
    assert places == sorted(places)


def possible(constraints: list[tuple[int, int, int]], query: int) -> tuple[Fraction, Fraction]:
    """The least and greatest ``a + b * query`` of all lines with ``sign * (a + b x) >= sign * y`` for all.

    By brute force, in exact arithmetic: every corner of the feasible set is looked at.
    """
    limit = Fraction(RATE_LIMIT)
    rows = [(Fraction(sign), Fraction(sign * x), Fraction(sign * y)) for sign, x, y in constraints]
    rows += [(Fraction(0), Fraction(1), -limit), (Fraction(0), Fraction(-1), -limit)]
    offsets = []
    for (a1, b1, c1), (a2, b2, c2) in combinations(rows, 2):
        determinant = a1 * b2 - a2 * b1
        if determinant:
            a, b = (c1 * b2 - c2 * b1) / determinant, (a1 * c2 - a2 * c1) / determinant
            if all(p * a + q * b >= c for p, q, c in rows):
                offsets.append(a + b * query)
    return min(offsets), max(offsets)


@given(
    st.lists(st.tuples(st.sampled_from([1, -1]), st.integers(0, 300 * S), latencies), max_size=8),
    st.integers(-150_000, 150_000),
    st.integers(-50 * S, 400 * S),
)
@settings(max_examples=200)
def test_the_limits_are_those_of_every_line_between_the_bounds_found_by_brute_force(
    extra: list[tuple[int, int, int]], ppb: int, query: int
) -> None:
    def offset(x: int) -> int:
        return x * ppb // 10**9

    observed = [(1, 0, 40 * US), (-1, 10 * S, 60 * US), *extra]
    constraints = [(sign, x, offset(x) - late if sign > 0 else offset(x) + late + 1) for sign, x, late in observed]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clock_module, "WANDER_PER_NS", 0.0)
        patch.setattr(clock_module, "_MAX_VERTICES", 1000)
        clock = DeviceClock()
        for sign, x, y in constraints:
            (clock.lower if sign > 0 else clock.upper)(DAY + x, 5 * DAY + x + y)
        placement = placed(clock, DAY + query)
    low, high = possible(constraints, query)
    assert abs(placement.host_ns - (5 * DAY + query) - (low + high) / 2) <= 1
    assert 0 <= placement.uncertainty_ns - (high - low) / 2 <= 3


@given(st.lists(st.tuples(st.floats(-1e6, 1e6), st.floats(-1e-4, 1e-4)), min_size=30, max_size=60))
def test_dropping_an_edge_loses_no_possible_line(points: list[tuple[float, float]]) -> None:
    polygon = clock_module._hull(list(points))
    if len(polygon) < 5:
        return
    smaller = clock_module._without_least_edge(polygon)
    assert len(smaller) == len(polygon) - 1
    for elapsed in (-1e11, -1e9, 0.0, 1e8, 1e9, 1e10, 1e11):
        before = [offset + rate * elapsed for offset, rate in polygon]
        after = [offset + rate * elapsed for offset, rate in smaller]
        slack = 1e-9 * max(map(abs, before))
        assert min(after) <= min(before) + slack
        assert max(after) >= max(before) - slack


def test_nothing_is_placed_before_there_are_bounds_from_both_sides() -> None:
    clock = DeviceClock()
    assert clock.at(0) is None
    clock.lower(0, 100)
    assert clock.at(0) is None
    clock.lower(S, S + 100)
    clock.upper(S, S + 300)
    assert covers(placed(clock, S), S + 200)
    assert placed(clock, S).uncertainty_ns <= 300


def test_an_upper_bound_may_come_first() -> None:
    clock = DeviceClock()
    clock.upper(S, S + 300)
    assert clock.at(S) is None
    clock.lower(S, S + 100)
    assert placed(clock, S) == Placement(S + 200, placed(clock, S).uncertainty_ns)


def test_a_truncated_reading_is_placed_in_the_middle_of_what_it_can_stand_for() -> None:
    clock = DeviceClock(resolution_ns=1000)
    clock.lower(5_000, 50_700)
    clock.upper(5_000, 50_700)  # read and bounded at once: the true device time is one of 5000 .. 5999
    assert covers(placed(clock, 5_000), 50_700)
    assert placed(clock, 5_000).uncertainty_ns < 1_010


def test_brackets_that_are_wide_on_either_side_leave_only_what_they_have_in_common() -> None:
    clock = DeviceClock()
    for i, (before, after) in enumerate([(2 * US, 60 * US), (60 * US, 2 * US), (2 * US, 60 * US)]):
        bracket(clock, i * 100 * MS, HOST_START_NS + i * 100 * MS, before, after)
    placement = placed(clock, 150 * MS)
    assert abs(placement.host_ns - HOST_START_NS - 150 * MS) <= 20 * US
    assert placement.uncertainty_ns <= 25 * US  # Any rate is possible yet: 200 ppm of 100 ms are 20 us.


def test_uncertainty_grows_with_the_distance_from_the_bounds() -> None:
    clock = DeviceClock()
    end = feed(clock, line(20, 0, DAY), 0, 60)
    grown = [placed(clock, end + seconds * S).uncertainty_ns for seconds in (0, 1, 10, 60, 600)]
    assert grown == sorted(grown)
    assert grown[0] < 30 * US < 300 * US < grown[-1]


def test_a_bracket_after_a_quiet_minute_counts_in_full() -> None:
    host = line(20, 0, DAY)
    clock = DeviceClock()
    end = 0
    for _ in range(60):
        end += S
        bracket(clock, end, host(end), 1, 1)
    end += 60 * S
    assert placed(clock, end).uncertainty_ns > 100 * US
    bracket(clock, end, host(end), 20 * US, 20 * US)
    assert placed(clock, end).uncertainty_ns <= 20 * US + 3


def test_where_every_bound_is_a_corner_they_are_thinned_and_the_truth_stays_within() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clock_module, "WANDER_PER_NS", 0.0)
        clock = DeviceClock()
        for i in range(-500, 500):
            bracket(clock, i * 100 * MS, DAY + i * 100 * MS, 10_000 + i * i, 10_000 + i * i)  # two parabolas
            assert covers(placed(clock, i * 100 * MS + S), DAY + i * 100 * MS + S)
        assert clock._current is not None
        assert len(clock._current.polygon) <= 12
        assert placed(clock, 0).uncertainty_ns < 10_500


# Jumps and outliers


@pytest.mark.slow
@pytest.mark.parametrize("ppm", [0, 150])
@pytest.mark.parametrize("jump_ns", [-5 * DAY, 5 * DAY, -5 * S, 5 * S, -5 * MS, 5 * MS, -200 * US, 200 * US])
def test_after_a_jump_spans_are_right_again_within_two_seconds(jump_ns: int, ppm: int) -> None:
    before, jump_at = drifting(ppm), HOST_START_NS + 100 * S + 123 * MS
    clock = DeviceClock(US)
    samples = place(
        engine(lambda host_ns: 10 * DAY + before(host_ns) + (jump_ns if host_ns >= jump_at else 0), 200),
        clock,
    )
    assert clock.resets == 1
    wrong = [s.host_ns for s in samples if abs(s.error_ns) > s.uncertainty_ns]
    assert all(jump_at - 100 * MS < host_ns < jump_at + 2 * S for host_ns in wrong)
    assert figures([s for s in samples if s.host_ns > jump_at + 10 * S]).p99_error <= 50


@given(bounds, st.integers(1 * MS, 5 * DAY), st.sampled_from([1, -1]))
def test_what_follows_a_reset_is_within_its_uncertainty(bounds: list[Bound], jump: int, sign: int) -> None:
    clock = DeviceClock()
    end = feed(clock, line(30, 10 * DAY, 20 * DAY), 10 * DAY, 10)
    new_host = line(30, end + sign * jump, 20 * DAY + 10 * S + 300 * US)
    device_ns = feed(clock, new_host, end + sign * jump, 2)
    assert clock.resets == 1
    for after, lower, upper in bounds:
        device_ns += abs(after)
        clock.lower(device_ns, new_host(device_ns) - (lower or 1))
        clock.upper(device_ns, new_host(device_ns) + (upper or 1))
        assert covers(placed(clock, device_ns, new_host(device_ns)), new_host(device_ns))
    assert clock.resets == 1


def test_a_span_from_before_a_reset_is_still_placed_by_the_clock_it_was_read_from() -> None:
    clock = DeviceClock()
    old, new = line(10, 3 * DAY, HOST_START_NS), line(-40, 0, HOST_START_NS + 31 * S)
    end = feed(clock, old, 3 * DAY, 30)
    feed(clock, new, 0, 5)
    late = end - 2 * S
    assert covers(placed(clock, late, near_host_ns=old(late) - 20 * MS), old(late))
    assert covers(placed(clock, 3 * S, near_host_ns=new(3 * S) - 20 * MS), new(3 * S))


def test_a_span_is_placed_by_the_new_clock_before_the_reset_is_certain() -> None:
    clock = DeviceClock()
    feed(clock, line(10, 3 * DAY, HOST_START_NS), 3 * DAY, 30)
    new = line(10, 0, HOST_START_NS + 31 * S)
    bracket(clock, S, new(S))
    assert clock.resets == 0
    assert covers(placed(clock, S, near_host_ns=new(S) - 20 * MS), new(S))


@pytest.mark.slow
@pytest.mark.parametrize("error_ns", [-DAY, -S, -10 * MS, -200 * US, 200 * US, 10 * MS, S, DAY])
@pytest.mark.parametrize("which", ["lower", "upper"])
def test_a_single_wrong_bound_changes_nothing(error_ns: int, which: str) -> None:
    host = line(50, 0, DAY)
    clock, undisturbed = DeviceClock(), DeviceClock()
    for i in range(600):
        device_ns = i * 100 * MS
        if i == 300:
            getattr(clock, which)(device_ns, host(device_ns) + error_ns)
        for each in (clock, undisturbed):
            bracket(each, device_ns, host(device_ns))
        assert placed(clock, device_ns, host(device_ns)) == placed(undisturbed, device_ns, host(device_ns))
    assert clock.resets == 0


def test_wrong_bounds_now_and_then_start_no_segment_and_displace_no_span() -> None:
    rng = random.Random(4)
    observations = list(engine(drifting(50), 600))
    for i, observation in enumerate(observations):
        if observation.kind != "at" and rng.random() < 0.005:
            stale = observation.device_ns - rng.randrange(10 * MS, 5 * S)
            observations[i] = observation._replace(device_ns=stale)
    clock = DeviceClock(US)
    run = figures(place(iter(observations), clock))
    assert clock.resets == 0
    assert run.within >= 0.999
    assert run.p99_error <= 50


def test_a_wrong_first_bound_is_got_over() -> None:
    clock = DeviceClock()
    clock.lower(0, DAY + S)
    host = line(0, 0, DAY)
    end = feed(clock, host, 10 * MS, 2)
    assert covers(placed(clock, end, host(end)), host(end))


def test_late_bounds_from_before_a_reset_do_not_disturb_the_new_segment() -> None:
    clock = DeviceClock()
    old, new = line(10, 3 * DAY, HOST_START_NS), line(10, 0, HOST_START_NS + 31 * S)
    end = feed(clock, old, 3 * DAY, 30)
    feed(clock, new, 0, 5)
    for late in range(end - S, end, 100 * MS):
        bracket(clock, late, old(late))
    after = feed(clock, new, 5 * S, 5)
    assert clock.resets == 1
    assert covers(placed(clock, after, new(after)), new(after))


def test_late_bounds_from_before_a_reset_do_not_hide_it() -> None:
    clock = DeviceClock()
    old, new = line(10, 3 * DAY, HOST_START_NS), line(10, 0, HOST_START_NS + 31 * S)
    end = feed(clock, old, 3 * DAY, 30)
    bracket(clock, 0, new(0))
    bracket(clock, end - S, old(end - S))
    bracket(clock, 100 * MS, new(100 * MS))
    assert clock.resets == 1


def test_a_device_that_starts_again_after_200_days_is_noticed() -> None:
    clock = DeviceClock()
    feed(clock, line(10, 200 * DAY, 201 * DAY), 200 * DAY, 10)
    new = line(10, 0, 201 * DAY + 15 * S)
    end = feed(clock, new, 0, 2)
    assert clock.resets == 1
    assert covers(placed(clock, end, new(end)), new(end))


def test_two_wrong_bounds_far_apart_are_not_a_jump() -> None:
    host = line(0, 0, DAY)
    clock = DeviceClock()
    end = feed(clock, host, 0, 10)
    for _ in range(2):
        clock.lower(end, host(end) + 10 * MS)
        for _ in range(100):  # Bounds of stages: too loose to tell which it was.
            end += S
            bracket(clock, end, host(end), 50 * MS, 50 * MS)
    assert clock.resets == 0


# How it does over time


@pytest.mark.slow
@pytest.mark.parametrize("ppm", [0, 5, 50, 150])
@pytest.mark.parametrize("one_sided", [False, True])
def test_with_a_ping_a_second_spans_are_placed_within_microseconds(ppm: int, one_sided: bool) -> None:
    clock = DeviceClock(US)
    run = figures(place(engine(drifting(ppm), 1800, one_sided=one_sided), clock))
    assert run.median_error <= 10
    assert run.p99_error <= 50
    assert run.within >= 0.999
    assert run.median_uncertainty < 100
    assert clock.resets == 0


@pytest.mark.slow
@pytest.mark.parametrize("ppm", [0, 5, 50, 150])
def test_without_pings_an_idle_moment_a_second_is_enough(ppm: int) -> None:
    clock = DeviceClock(US)
    run = figures(place(engine(drifting(ppm), 1800, pings=False), clock))
    assert run.p99_error <= 500
    assert run.within >= 0.999
    assert clock.resets == 0


@pytest.mark.slow
@pytest.mark.parametrize("pings", [True, False])
def test_a_board_that_warms_up_and_cools_down_is_followed(pings: bool) -> None:
    """10 ppm a minute at most: the rate swings by 50 ppm within half an hour."""
    wave = 2 * math.pi / 900
    swing = 10e-6 / 60 / wave

    def reading(host_ns: int) -> int:
        seconds = (host_ns - HOST_START_NS) / S
        return DAY + host_ns + round(swing / wave * (1 - math.cos(wave * seconds)) * S)

    clock = DeviceClock(US)
    run = figures(place(engine(reading, 1800, pings=pings), clock))
    assert clock.resets == 0
    assert run.within >= 0.999
    assert run.p99_error <= (50 if pings else 500)


@pytest.mark.slow
def test_memory_does_not_grow_with_observations() -> None:
    rng = random.Random(5)
    host = line(80, 0, DAY)
    clock = DeviceClock()
    device_ns = 0

    def observe(count: int) -> int:
        nonlocal device_ns
        for _ in range(count):
            device_ns += rng.randrange(100 * MS)
            bracket(clock, device_ns, host(device_ns), rng.randrange(50 * US), rng.randrange(50 * US))
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        assert observe(50_000) - observe(500) < 5_000
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_resets() -> None:
    clock = DeviceClock()
    for i in range(50):
        feed(clock, line(0, 0, DAY + i * 10 * S), 0, 1)
    assert clock.resets == 49
    assert len(clock._past) <= 4
