"""Counting: exact sums, buckets as OpenTelemetry defines them, and a bounded number of series."""

from __future__ import annotations

import itertools
import math
import random
import sys

import pytest

from otel_npu import semconv
from otel_npu.relay.metrics import series
from otel_npu.relay.metrics.series import Distribution, ExponentialDistribution, Family, Names

BOUNDS = (10, 100, 1000)
STAGES = 100_000


def test_a_value_lies_in_the_first_bucket_whose_bound_it_does_not_exceed() -> None:
    distribution = Distribution(BOUNDS)
    for value in (0, 10, 11, 100, 1000, 1001, 10**12):
        distribution.add(value)
    assert distribution.buckets == [2, 2, 1, 2]
    assert (distribution.count, distribution.smallest, distribution.largest) == (7, 0, 10**12)


def test_a_sum_of_a_billion_nanoseconds_is_exact() -> None:
    distribution = Distribution(BOUNDS)
    for _ in range(1000):
        distribution.add(10**18 + 1)
    assert distribution.total == 1000 * (10**18 + 1)


@pytest.mark.parametrize("spread", [1, 10, 10**4, 10**9])
def test_an_exponential_histogram_has_each_value_between_the_bounds_of_its_bucket(spread: int) -> None:
    distribution = ExponentialDistribution(BOUNDS, 1e-9, 160, 20)
    values = [random.Random(spread).randrange(1000, 1000 * (1 + spread)) for _ in range(2000)]
    for value in values:
        distribution.add(value)
    base = 2 ** (2.0**-distribution.scale)
    for value in values:
        seconds = value * 1e-9
        assert any(
            base**exponent <= seconds * (1 + 1e-9) and seconds <= base ** (exponent + 1) * (1 + 1e-9)
            for exponent in distribution.exponents
        )
    assert sum(distribution.exponents.values()) == 2000
    assert max(distribution.exponents) - min(distribution.exponents) < 160


def test_it_is_as_fine_as_its_buckets_allow() -> None:
    distribution = ExponentialDistribution(BOUNDS, 1e-9, 160, 20)
    for value in (10_000, 10_000_000_000):  # 10 us to 10 s, 20 powers of two
        distribution.add(value)
    assert distribution.scale == 3


def test_zeros_stand_apart() -> None:
    distribution = ExponentialDistribution(BOUNDS, 1, 160, 20)
    for value in (0, 0, 4):
        distribution.add(value)
    assert (distribution.zeros, distribution.count, sum(distribution.exponents.values())) == (2, 3, 1)


def test_of_too_many_names_the_first_have_series_and_the_others_are_counted_under_other() -> None:
    refused = 0

    def count() -> None:
        nonlocal refused
        refused += 1

    names = Names(count)
    family = Family(semconv.STAGE_DURATION, names, None)
    for number in range(STAGES):
        family.record((f"stage {number}", "decode", 0, 0, 0, "device", None), 1000)
    assert len(family.series) == Names.MAX_NAMES + 1
    other = family.series["other", "decode", 0, 0, 0, "device", None]
    assert isinstance(other, Distribution)
    assert other.count == refused == STAGES - Names.MAX_NAMES
    assert sum(each.count for each in family.series.values() if isinstance(each, Distribution)) == STAGES
    assert sys.getsizeof(names._known["npu.stage.name"]) < 50_000


def test_so_are_combinations_beyond_so_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(series, "MAX_SERIES", 100)
    refused: list[None] = []
    family = Family(semconv.HANGS, Names(lambda: refused.append(None)), None)
    for number in range(200):
        family.add((f"stage {number % 20}", f"kind {number // 20}", 0, 0), 1)
    assert len(family.series) == 101
    assert family.at(("other",) * 4).value == len(refused) == 100


def test_the_buckets_of_times_reach_from_10_us_to_10_s() -> None:
    bounds = [bound * 1e-9 for bound in semconv.STAGE_DURATION.bounds]
    assert [bounds[0], bounds[-1]] == pytest.approx([1e-5, 10])
    assert all(1.9 < math.exp(math.log(after / before)) < 2.6 for before, after in itertools.pairwise(bounds))
