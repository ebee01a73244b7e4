"""Eight ranks, fifty steps a second, one in a hundred slow: what the relay counts, and which steps it keeps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.faults.effort import times
from tests.helpers.capturing import capturing
from tests.helpers.fleet import LATE_NS, LATE_RANK, STAGES, Fleet, Relay

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.slow

STEPS = times(750, 15_000)  # in full: five minutes


@pytest.fixture(scope="module", params=["one relay", "two relays"])
def fleet(request: pytest.FixtureRequest) -> Iterator[Fleet]:
    first = Relay()
    second = Relay() if request.param == "two relays" else first
    with capturing(steps_per_second=2) as captured, pytest.MonkeyPatch.context() as monkeypatch:
        fleet = Fleet(captured, monkeypatch, [first] * 4 + [second] * 4)
        fleet.run(STEPS)
        yield fleet


@pytest.fixture(scope="module")
def points(fleet: Fleet) -> list[dict[str, list[Any]]]:
    """Of each relay."""
    return [relay.points() for relay in dict.fromkeys(fleet.relays)]


def test_every_slow_step_is_kept_and_nobody_for_following_one(fleet: Fleet) -> None:
    assert len(fleet.slow) > 3
    kept = fleet.relays[0].kept()
    assert fleet.slow <= set(kept)
    reasons: dict[str, set[int]] = {}
    for span in fleet.relays[0].spans:
        attributes: Any = span.attributes
        if span.name == "engine_step":
            reasons.setdefault(attributes["npu.sampled.reason"], set()).add(attributes["npu.step.number"])
    assert reasons["slow"] == fleet.slow - reasons["rate"]
    assert len(reasons["rate"]) == pytest.approx(2 * STEPS / 50, abs=3)


def test_every_rank_is_in_the_one_trace_of_each_kept_step(fleet: Fleet) -> None:
    first, *others = [relay.kept() for relay in dict.fromkeys(fleet.relays)]
    ranks = {number: dict(traces) for number, traces in first.items()}
    for other in others:
        assert set(other) == set(first)  # two relays keep the same
        for number, traces in other.items():
            for trace, there in traces.items():
                ranks[number][trace] = ranks[number].get(trace, set()) | there
    assert all(list(traces.values()) == [set(range(8))] for traces in ranks.values())


def test_counts_are_the_steps_that_ran_and_sums_the_times_they_took(
    fleet: Fleet, points: list[dict[str, list[Any]]]
) -> None:
    counted = {
        (point.attributes["npu.stage.name"], point.attributes["npu.rank"]): point
        for relay in points
        for point in relay["npu.stage.duration"]
    }
    assert len(counted) == len(STAGES) * 8
    for series, executed_ns in fleet.executed.items():
        assert counted[series].count == fleet.count[series] == STEPS
        assert counted[series].sum == pytest.approx(executed_ns * 1e-9, rel=1e-6)
    assert sum(point.count for relay in points for point in relay["npu.step.duration"]) == 8 * STEPS
    assert sum(point.value for relay in points for point in relay["npu.steps.resolved"]) == 8 * STEPS
    assert sum(point.value for relay in points for point in relay["npu.steps.captured"]) == 8 * STEPS
    assert sum(point.count for point in points[0]["npu.step.tokens"]) == STEPS
    assert sum(point.sum for point in points[0]["npu.step.tokens"]) == 4 * STEPS


def test_the_device_is_as_busy_as_it_was(fleet: Fleet, points: list[dict[str, list[Any]]]) -> None:
    for relay in points:
        for point in relay["npu.device.step_time"]:
            rank = point.attributes["npu.rank"]
            executed_ns = sum(ns for (_, each), ns in fleet.executed.items() if each == rank)
            assert point.value == pytest.approx(executed_ns * 1e-9, rel=1e-6)


def test_idle_time_is_what_lay_between_the_steps(fleet: Fleet, points: list[dict[str, list[Any]]]) -> None:
    idle = {point.attributes["npu.rank"]: point for relay in points for point in relay["npu.step.idle"]}
    assert {rank: point.count for rank, point in idle.items()} == dict.fromkeys(range(8), STEPS - 1)
    for rank, idle_ns in fleet.idle.items():
        assert idle[rank].sum == pytest.approx(idle_ns * 1e-9, rel=1e-6)


def test_the_rank_that_the_others_waited_for_is_counted(fleet: Fleet, points: list[dict[str, list[Any]]]) -> None:
    if len(points) > 1:  # neither relay knows all ranks
        assert "npu.rank.straggles" not in points[0]
        return
    straggles = {point.attributes["npu.rank"]: point.value for point in points[0]["npu.rank.straggles"]}
    # In slow steps the ranks differ by more than the clocks are unsure of: somebody else may be late.
    assert fleet.late <= straggles[LATE_RANK] <= fleet.late + len(fleet.slow)
    assert sum(straggles.values()) <= fleet.late + len(fleet.slow)
    [skew] = points[0]["npu.rank.skew"]
    assert skew.count == sum(straggles.values())
    assert skew.max == pytest.approx(LATE_NS * 1e-9, rel=0.2)


def test_each_exemplar_leads_to_a_span_that_was_kept(fleet: Fleet, points: list[dict[str, list[Any]]]) -> None:
    for relay, told in zip(dict.fromkeys(fleet.relays), points, strict=True):
        spans = {(span.context.trace_id, span.context.span_id): span for span in relay.spans if span.context}
        exemplars = [(point, exemplar) for point in told["npu.stage.duration"] for exemplar in point.exemplars]
        assert len(exemplars) > 50
        for point, exemplar in exemplars:
            span: Any = spans[exemplar.trace_id, exemplar.span_id]
            assert span.name == point.attributes["npu.stage.name"]
            assert (span.end_time - span.start_time) * 1e-9 == pytest.approx(exemplar.value, abs=2e-9)


def test_nothing_is_left_behind(fleet: Fleet) -> None:
    for relay in dict.fromkeys(fleet.relays):
        assert not relay.joiner._steps
        assert not relay.joiner._strangers._teller
        assert relay.joiner._strangers.stages == 0
        assert relay.drops.take_unsent() == {}
