"""Who was slow in a step: a late rank, an idle device, a host that does not launch in time."""

from __future__ import annotations

from typing import Any

import pytest

from otel_npu.relay.placing import Place, Ran
from otel_npu.relay.verdicts import Bubbles, Straggler, launch_bound, straggler
from tests.helpers.built import stage, step
from tests.helpers.joined import MS, STEP_NS, Joined, attributes

US = 1_000


def run_of(rank: int, start_ns: int, uncertainty_ns: int | None = 10 * US, **of_stage: Any) -> Ran:
    """A rank's run whose forward starts there."""
    made = step(rank=rank, stages=[stage(name="prepare_input"), stage(name="forward", **of_stage)])
    places = [Place(0, 1, uncertainty_ns), Place(start_ns, start_ns + MS, uncertainty_ns)]
    return Ran(made, (places, 0, 1), 0, has_device=True)


# Stragglers


def test_the_rank_that_starts_its_forward_last_is_named_with_by_how_much() -> None:
    assert straggler([run_of(0, 100 * MS), run_of(1, 105 * MS)], 2) == Straggler(1, 5 * MS)
    assert straggler([run_of(0, 9 * MS), run_of(1, 2 * MS), run_of(2, 3 * MS)], 3) == Straggler(0, 7 * MS)


def test_nobody_is_named_within_what_the_clocks_leave_open() -> None:
    assert straggler([run_of(0, MS), run_of(1, MS + 20 * US)], 2) is None
    assert straggler([run_of(0, MS), run_of(1, MS + 20 * US + 1)], 2) == Straggler(1, 20 * US + 1)
    assert straggler([run_of(0, MS, 4 * MS), run_of(1, 5 * MS)], 2) is None


def test_nobody_is_named_where_a_forward_was_not_timed_by_its_device_or_its_clock_is_unknown() -> None:
    assert straggler([run_of(0, MS, device_ns=None), run_of(1, 9 * MS)], 2) is None
    assert straggler([run_of(0, MS, None), run_of(1, 9 * MS)], 2) is None
    assert straggler([run_of(0, MS)], 1) is None


def test_only_ranks_of_one_stage_of_the_pipeline_wait_for_each_other() -> None:
    runs = [run_of(0, 1 * MS), run_of(1, 2 * MS), run_of(2, 50 * MS), run_of(3, 53 * MS)]
    assert straggler(runs, 2) == Straggler(3, 3 * MS)
    assert straggler(runs[::2], 1) is None


def test_an_engines_step_names_its_straggler_once_all_ranks_have_told() -> None:
    joined = Joined()
    joined.schedule(1, ranks=2)
    for rank, late_ns in ((0, 0), (1, 5 * MS)):
        start_ns = STEP_NS + late_ns
        timed = stage(
            name="forward", entered_ns=start_ns, exited_ns=start_ns + 1, device_ns=start_ns, duration_ns=2 * MS
        )
        joined.run(1, rank, stages=[timed], seen_ns=start_ns + 2 * MS + 1)
    joined.update(1)
    said = attributes(joined.only("engine_step"))
    assert said["npu.step.straggler.rank"] == 1
    assert said["npu.step.skew"] == pytest.approx(5e-3, abs=1e-4)


def test_a_step_of_which_a_rank_is_missing_names_nobody() -> None:
    joined = Joined()
    joined.schedule(1, ranks=2)
    joined.run(1)
    joined.update(1)
    joined.pass_seconds(1)
    assert "npu.step.straggler.rank" not in attributes(joined.only("engine_step"))


# Bubbles


def ran(start_ns: int, end_ns: int, *, host_ns: int | None = None, device: int = 0) -> Ran:
    """A step of two stages on the device."""
    opened_ns = start_ns if host_ns is None else host_ns
    stages = [
        stage(device_ns=start_ns, duration_ns=1, device_index=device),
        stage(device_ns=end_ns - 1, duration_ns=1, device_index=device),
    ]
    made = step(opened_ns=opened_ns, seen_ns=opened_ns + end_ns - start_ns, stages=stages)
    return Ran(made, ([], 0, 0), 0, has_device=True)


def test_a_bubble_is_what_lies_between_two_steps_on_the_devices_clock() -> None:
    bubbles = Bubbles()
    assert bubbles.before(ran(0, 10 * MS)) is None  # there was none before
    assert bubbles.before(ran(12 * MS, 20 * MS)) == 2 * MS
    assert bubbles.before(ran(20 * MS, 30 * MS)) == 0
    assert bubbles.before(ran(29 * MS, 40 * MS)) == 0  # on another stream


def test_each_device_has_its_own_and_what_the_host_timed_has_none() -> None:
    bubbles = Bubbles()
    assert bubbles.before(ran(0, 10 * MS)) is None
    assert bubbles.before(ran(50 * MS, 60 * MS, device=1)) is None
    assert bubbles.before(Ran(step(stages=[stage(device_ns=None)]), ([], 0, 0), 0, has_device=True)) is None
    assert bubbles.before(ran(13 * MS, 20 * MS)) == 3 * MS


def test_a_clock_that_jumps_makes_no_bubble() -> None:
    bubbles = Bubbles()
    bubbles.before(ran(0, 10 * MS, host_ns=0))
    assert bubbles.before(ran(10**15, 10**15 + MS, host_ns=12 * MS)) is None
    assert bubbles.before(ran(5, MS, host_ns=15 * MS)) is None
    assert bubbles.before(ran(2 * MS, 3 * MS, host_ns=17 * MS)) == MS


def test_a_ranks_step_and_its_engines_step_say_how_long_the_device_was_idle_before() -> None:
    joined = Joined()
    for number in (1, 2):
        joined.schedule(number)
        start_ns = number * STEP_NS
        timed = stage(entered_ns=start_ns, exited_ns=start_ns + 1, device_ns=start_ns, duration_ns=8 * MS)
        [*_, worker] = joined.run(number, stages=[timed], opened_ns=start_ns, seen_ns=start_ns + 8 * MS + 1)
        joined.update(number)
    assert attributes(worker)["npu.step.idle"] == 2e-3
    first, second = joined.named("engine_step")
    assert "npu.step.idle" not in attributes(first)
    assert attributes(second)["npu.step.idle"] == 2e-3


# Launch-bound steps


def launched(exited_ns: int, duration_ns: int, uncertainty_ns: int | None = 10 * US) -> Ran:
    """A step whose longest stage was launched from 0 until then, and begins at 0 on the device."""
    longest = stage(entered_ns=0, exited_ns=exited_ns, device_ns=0, duration_ns=duration_ns)
    short = stage(name="sample", entered_ns=0, exited_ns=0, device_ns=0, duration_ns=US)
    places = [Place(0, US, uncertainty_ns), Place(0, duration_ns, uncertainty_ns)]
    return Ran(step(stages=[short, longest]), (places, 0, duration_ns), 0, has_device=True)


def test_a_step_is_launch_bound_where_its_longest_stage_is_over_as_soon_as_it_is_launched() -> None:
    assert launch_bound(launched(exited_ns=10 * MS, duration_ns=10 * MS)) is True
    assert launch_bound(launched(exited_ns=9 * MS, duration_ns=10 * MS)) is True
    assert launch_bound(launched(exited_ns=9 * MS - 1, duration_ns=10 * MS)) is False
    assert launch_bound(launched(exited_ns=1 * MS, duration_ns=10 * MS)) is False


def test_whether_a_step_is_launch_bound_is_not_said_where_the_clock_is_not_that_sure() -> None:
    assert launch_bound(launched(10 * MS, 10 * MS, uncertainty_ns=MS + 1)) is None
    assert launch_bound(launched(10 * MS, 10 * MS, uncertainty_ns=None)) is None
    host = Ran(step(stages=[stage(device_ns=None)]), ([Place(0, MS, None)], 0, MS), 0, has_device=True)
    assert launch_bound(host) is None
