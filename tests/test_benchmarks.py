"""The benchmarks of a step run, here with few rounds, and what they make of their samples is right."""

from __future__ import annotations

import random
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from benchmarks import comparing
from tests.helpers import REPOSITORY
from tests.helpers.vllm_server import needs_vllm

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow


def run(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_a_step_is_measured_hot_and_cold_by_part_and_drawn(tmp_path: Path) -> None:
    picture = tmp_path / "step.svg"
    table = run("benchmarks.step_cost", "--rounds", "1", "--devices", "cpu", "--picture", str(picture))
    for row in ("hot", "cold", "open", "first stage", "further stages", "close", "the kernel's send"):
        assert any(line.split("  ")[1] == row for line in table.splitlines() if line.startswith("  ")), row
    assert "</svg>" in picture.read_text()


@needs_vllm
def test_a_step_of_vllm_is_measured_with_and_without_our_hooks() -> None:
    table = run("benchmarks.vllm_step_cost", "--rounds", "1", "--steps", "8")
    assert "EngineCore, processor time" in table


def test_the_relays_price_is_measured_idle_and_serving() -> None:
    table = run("benchmarks.relay_cost", "--seconds", "1")
    for row in ("idle", "serving 8 ranks", "a step of one rank", "a span", "a request in a step"):
        assert any(line.startswith(row) for line in table.splitlines()), row


def test_the_interval_of_a_median_holds_the_truth_19_times_of_20() -> None:
    rng = random.Random(1)
    held = 0
    for _ in range(1000):
        interval = comparing.median([rng.expovariate(1) for _ in range(30)])
        held += interval.low <= 0.6931 <= interval.high
    assert held >= 940


def test_the_interval_of_a_ratio_holds_the_truth_19_times_of_20() -> None:
    rng = random.Random(1)
    held = 0
    for _ in range(60):
        one, other = ([rng.gauss(mean, 1) for _ in range(40)] for mean in (3, 10))
        interval = comparing.ratio_of_medians(one, other)
        held += interval.low <= 0.3 <= interval.high
    assert held >= 54
