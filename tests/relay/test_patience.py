"""What a relay's deadlines count: time in which what is waited for could have been read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from otel_npu.relay.patience import BEHIND, LATE_NS, LONGEST_TURN, Patience
from tests.helpers.built import request_end, scheduled, step, updated
from tests.helpers.capturing import SECOND, Clock

if TYPE_CHECKING:
    from otel_npu.wire import frames


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def patience(clock: Clock) -> Patience:
    return Patience(clock)


def turn(clock: Clock, patience: Patience, seconds: float) -> float:
    """What one turn of this length adds."""
    before = patience()
    clock.ns += round(seconds * SECOND)
    patience.turn()
    return patience() - before


def timed(age_ns: int, clock: Clock) -> list[frames.Frame]:
    """Frames of each kind that says when it was sent: so long ago."""
    at_ns = clock.ns - age_ns
    return [step(1, seen_ns=at_ns), scheduled(1, scheduled_ns=at_ns), updated(1, closed_ns=at_ns)]


def test_while_frames_are_read_as_they_come_it_is_the_time_itself(clock: Clock, patience: Patience) -> None:
    for frame in timed(LATE_NS, clock):
        patience.read(frame)
    assert turn(clock, patience, 0.05) == pytest.approx(0.05)


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_a_turn_in_which_a_frame_was_read_late_counts_little_and_the_next_fully(
    kind: int, clock: Clock, patience: Patience
) -> None:
    patience.read(timed(LATE_NS + 1, clock)[kind])
    patience.read(timed(0, clock)[kind])
    assert turn(clock, patience, 0.05) == pytest.approx(0.05 * BEHIND)
    assert turn(clock, patience, 0.05) == pytest.approx(0.05)


def test_of_a_long_pause_little_counts(clock: Clock, patience: Patience) -> None:
    assert turn(clock, patience, 60) == pytest.approx(LONGEST_TURN)


def test_a_frame_that_does_not_say_when_it_was_sent_is_not_late(clock: Clock, patience: Patience) -> None:
    patience.read(request_end(1))
    assert turn(clock, patience, 0.05) == pytest.approx(0.05)
