"""What `top` counts: by hand, of steps whose times are known."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from otel_npu.cli.top_screen import draw
from otel_npu.looking.follow import Follower
from otel_npu.looking.tally import Tally, summary
from tests.helpers.built import hello, stage, step
from tests.helpers.watched import MS, engine_step, hellos, seen

BEGAN_NS = 10**12


class Watched:
    """A session that is counted."""

    def __init__(self) -> None:
        self.tally = Tally(BEGAN_NS)
        self.follower = Follower(self.tally.process, now=lambda: 0.0)

    def upto(self, seconds: float) -> None:
        """All of these seconds has come."""
        self.tally.upto_ns = BEGAN_NS + round(seconds * 1e9)

    def second(self, number: int, *, steps: int, ms: float = 8.0, kind: str = "decode") -> None:
        """So many steps, one each 20 ms."""
        for index in range(steps):
            opened_ns = BEGAN_NS + number * 1000 * MS + index * 20 * MS
            for view in engine_step(number * 1000 + index + 1, opened_ns, ms=ms, kind=kind):
                self.follower.take(view)


@pytest.fixture
def watched() -> Watched:
    made = Watched()
    for view in hellos(2):
        made.follower.take(view)
    return made


def test_steps_and_tokens_are_counted_by_the_second(watched: Watched) -> None:
    watched.second(0, steps=30)
    watched.second(1, steps=20, kind="prefill")
    watched.upto(2.25)  # what has come of the third second does not count yet
    found = summary(watched.tally)
    assert found["seconds"] == 2
    assert found["steps_per_second"] == {"decode": 15, "prefill": 10}
    assert found["tokens_per_second"] == 100
    assert found["requests_per_step"] == 2


def test_what_is_older_than_the_window_is_forgotten(watched: Watched) -> None:
    watched.second(0, steps=30)
    for number in range(1, 30):
        watched.second(number, steps=1)
    watched.upto(30.0)
    found = summary(watched.tally)
    assert found["seconds"] == 10
    assert found["steps"] == {"decode": 10}


def test_a_stage_has_its_share_its_quantiles_and_what_bounds_it(watched: Watched) -> None:
    watched.second(0, steps=40)
    watched.second(1, steps=1, ms=16)
    watched.upto(2.0)
    rows = {row["name"]: row for row in summary(watched.tally)["stages"]}
    forward = rows["forward"]
    assert forward["p50_ms"] == pytest.approx(8)
    assert forward["p99_ms"] == pytest.approx(16)
    assert forward["host_ms"] == pytest.approx(0.5)
    assert forward["device_ms"] == pytest.approx((40 * 8 + 16) / 41)
    assert forward["bound"] == "device-bound"
    assert forward["share"] == pytest.approx(1.0, abs=0.001)
    assert rows["attention"]["share"] == pytest.approx(0.5, abs=0.001)
    assert rows["bookkeep"]["bound"] == "host"


def test_a_rank_is_busy_or_idle_and_straggles(watched: Watched) -> None:
    watched.second(0, steps=50)
    watched.upto(1.0)
    first, last = summary(watched.tally)["ranks"]
    assert (first["rank"], last["rank"]) == (0, 1)
    assert first["busy"] == pytest.approx(0.4)  # 8 of each 20 ms
    assert first["idle"] == pytest.approx(0.6, abs=0.02)
    assert first["straggles_per_second"] == 0
    assert last["straggles_per_second"] == 50
    assert last["clock_uncertainty_us"] > 0


def test_the_slowest_step_of_the_last_minute_is_shown_with_its_stages_in_their_places(watched: Watched) -> None:
    for number in range(70):
        watched.second(number, steps=1, ms=30 if number == 20 else 8)
    slowest = summary(watched.tally)["slowest_step"]
    assert slowest["number"] == 20_001
    assert slowest["rank"] == 1  # it ended last
    assert slowest["ms"] == pytest.approx(32.5, abs=0.5)
    bars = {bar["name"]: bar for bar in slowest["stages"]}
    assert bars["schedule"]["ms"] == pytest.approx(1)
    assert bars["forward"]["start_ms"] == pytest.approx(2, abs=0.5)  # within what the clock allows
    assert bars["attention"]["depth"] == 1
    watched.second(100, steps=1)
    assert summary(watched.tally)["slowest_step"]["number"] != 20_001


def test_a_program_without_an_engine_has_its_own_steps() -> None:
    watched = Watched()
    watched.follower.take(seen(1, hello(pid=5)))
    for number in range(5):
        watched.follower.take(seen(1, step(number, kind="", stages=[stage()], seen_ns=BEGAN_NS + MS)))
    watched.upto(1.0)
    found = summary(watched.tally)
    assert found["steps"] == {"step": 5}
    assert [row["pid"] for row in found["ranks"]] == [5]


def test_where_the_engine_is_elsewhere_the_steps_are_its_ranks() -> None:
    watched = Watched()
    for view in hellos(2):
        watched.follower.take(view)
    for number in range(1, 4):
        for view in list(engine_step(number, BEGAN_NS + number * 20 * MS))[1:-1]:
            watched.follower.take(view)
    watched.upto(1.0)
    assert summary(watched.tally)["steps"] == {"decode": 3}


def test_the_stages_are_those_of_the_chosen_rank(watched: Watched) -> None:
    watched.second(0, steps=10)
    watched.upto(1.0)
    (row,) = [row for row in summary(watched.tally, 1)["stages"] if row["name"] == "forward"]
    assert row["per_second"] == 10


@pytest.mark.parametrize("columns", [80, 200])
def test_the_screen_has_it_all(watched: Watched, columns: int) -> None:
    watched.second(0, steps=10)
    watched.upto(1.0)
    found = {"session": "s", "processes": 3, "on": 2, "dropped": {"queue_full": 3}, "unseen_packets": 0}
    console = Console(width=columns, file=io.StringIO())
    with console.capture() as capture:
        console.print(draw({**found, **summary(watched.tally)}, columns, keys=True, frozen=True))
    shown = capture.get()
    for text in ("10.0 steps/s", "40 tokens/s", "forward", "device-bo", "1 of them off", "3 queue_full", "FROZEN"):
        assert text in shown
    assert "slowest step of the last minute: decode" in shown
