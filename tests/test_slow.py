"""Which steps are slow: judged by what is usual for steps of their kind, on a clock of the test's own."""

from __future__ import annotations

import math
import random
import sys

from otel_npu.drops import Drops
from otel_npu.slow import ENOUGH, SLOW_PER_SECOND, WINDOW, SlowSteps

MS = 1_000_000


def judge_of(factor: float = 3, drops: Drops | None = None, now_ns: list[int] | None = None) -> SlowSteps:
    at_ns = now_ns or [0]
    return SlowSteps(factor, drops or Drops(), lambda: at_ns[0])


def test_a_step_is_slow_that_takes_more_than_so_many_times_the_median() -> None:
    slow_steps = judge_of(3)
    assert not any(slow_steps.judge("decode", duration_ns * MS) for duration_ns in (9, 10, 11) * 10)
    assert not slow_steps.judge("decode", 30 * MS)
    assert slow_steps.judge("decode", 30 * MS + 1)


def test_each_kind_has_its_own_usual() -> None:
    slow_steps = judge_of()
    for _ in range(ENOUGH):
        slow_steps.judge(("decode", 3), 10 * MS)
        slow_steps.judge(("prefill", 9), 100 * MS)
    assert slow_steps.judge(("decode", 3), 100 * MS)
    assert not slow_steps.judge(("prefill", 9), 100 * MS)


def test_nothing_is_slow_before_there_is_a_usual() -> None:
    slow_steps = judge_of()
    assert not any(slow_steps.judge("decode", 10**n) for n in range(ENOUGH))


def test_what_is_usual_follows_the_latest_steps() -> None:
    now_ns = [0]
    slow_steps = judge_of(now_ns=now_ns)
    for _ in range(1000):
        slow_steps.judge("decode", 10 * MS)
    for _ in range(WINDOW):
        slow_steps.judge("decode", 100 * MS)
    now_ns[0] = 1000 * MS
    assert not slow_steps.judge("decode", 300 * MS)
    assert slow_steps.judge("decode", 301 * MS)


def test_off_judges_none() -> None:
    slow_steps = judge_of(math.inf)
    assert not any(slow_steps.judge("decode", 10**n) for n in range(30))


def test_a_few_a_second_are_kept_and_the_others_counted() -> None:
    drops, now_ns = Drops(), [0]
    slow_steps = judge_of(3, drops, now_ns)
    for _ in range(WINDOW):
        slow_steps.judge("decode", 10 * MS)
    kept = 0
    for second in range(10):
        now_ns[0] = second * 1000 * MS
        kept += sum(slow_steps.judge("decode", 100 * MS) for _ in range(2))
        kept += sum(slow_steps.judge("prefill", 1) for _ in range(10))
    assert kept == 20
    kept = sum(slow_steps.judge("decode", 1000 * MS) for _ in range(12))
    assert kept == SLOW_PER_SECOND - 2
    assert drops.take_unsent() == {"too_many_slow": 12 - kept}


def test_one_that_is_kept_anyway_uses_up_nothing() -> None:
    drops = Drops()
    slow_steps = judge_of(3, drops)
    for _ in range(WINDOW):
        slow_steps.judge("decode", 10 * MS)
    assert not any(slow_steps.judge("decode", 100 * MS, kept=True) for _ in range(20))
    assert slow_steps.judge("decode", 100 * MS)
    assert drops.take_unsent() == {}


def test_its_memory_is_bounded() -> None:
    slow_steps = judge_of()
    for number in range(100_000):
        slow_steps.judge(("kind", number % 5000), random.randrange(MS))
    assert len(slow_steps._classes) == 256
    assert all(len(usual.latest) <= WINDOW for usual in slow_steps._classes.values())
    assert sys.getsizeof(slow_steps._classes) < 20_000
