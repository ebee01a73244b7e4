"""Host cost of a captured stage on the real torch_npu binding, against what it is compared with. Prints the ratios.

Needs torch_npu; runs on an NPU or, with the simulated runtime of the tests, without one. Run from the repository:

    python -m benchmarks.stage_cost

Every variant runs once in every round, so that a slower moment of the machine slows all of them, and a ratio is the
median of the rounds' own. The task queue is drained outside of what is timed. Each setting of the queue has a
process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import statistics
import subprocess
import sys
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any

import otel_npu
from otel_npu.capture import switch

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.helpers.ascend.simulator import Simulator

_STAGES = 20  # stages in what is timed at once
_STAGES_PER_STEP = 5

_NULL = "nullcontext()"
_OFF = "stage(), switched off"
_BARE = "two bare records"
_STAGE = "stage()"
_WHOLE = f"stage() and its share of a step of {_STAGES_PER_STEP}, resolved and sent"
_OLD = "ProfileExecuteDuration's way"


class Rounds:
    """Times each variant once a round: nanoseconds a stage."""

    def __init__(self, drain: Callable[[], None], rounds: int) -> None:
        self._drain = drain
        self._rounds = rounds
        self.costs: dict[str, list[float]] = {}

    def time(self, variants: dict[str, Callable[[], None]]) -> None:
        """Time these variants against each other."""
        for name, variant in variants.items():
            variant()
            self.costs[name] = []
        gc.collect()
        gc.disable()
        for _ in range(self._rounds):
            for name, variant in variants.items():
                self._drain()
                began = perf_counter_ns()
                variant()
                self.costs[name].append((perf_counter_ns() - began) / _STAGES)
                self._drain()
        gc.enable()

    def cost(self, name: str) -> float:
        """Median nanoseconds a stage."""
        return statistics.median(self.costs[name])

    def ratio(self, one: str, other: str) -> float:
        """Median of the rounds' ratios."""
        return statistics.median(a / b for a, b in zip(self.costs[one], self.costs[other], strict=True))


def bare_records(torch: Any) -> Callable[[], None]:
    """Two records on events that exist: the least that timing a stage can cost."""
    pairs = [[torch.Event(device="npu:0", enable_timing=True) for _ in range(2)] for _ in range(_STAGES)]

    def run() -> None:
        for start, end in pairs:
            start.record()
            end.record()

    return run


def profile_execute_duration(torch: Any) -> Callable[[], None]:
    """The way of vllm-ascend's class: a new event pair each time, recorded without naming the stream."""
    captured: list[tuple[str, Any, Any]] = []

    @contextlib.contextmanager
    def capture_async(tag: str) -> Any:
        start = torch.npu.Event(enable_timing=True)
        start.record()
        try:
            yield
        finally:
            end = torch.npu.Event(enable_timing=True)
            end.record()
            captured.append((tag, start, end))

    def run() -> None:
        captured.clear()
        for _ in range(_STAGES):
            with capture_async("forward"):
                pass

    return run


def null_contexts() -> None:
    """What a block costs that nobody times."""
    null = contextlib.nullcontext
    for _ in range(_STAGES):
        with null():
            pass


def stages() -> None:
    """The stages themselves."""
    stage = otel_npu.stage
    for _ in range(_STAGES):
        with stage("forward"):
            pass


def whole_steps() -> None:
    """Whole steps: opened, their stages, closed, and older ones resolved and sent."""
    stage, step = otel_npu.stage, otel_npu.step
    for _ in range(_STAGES // _STAGES_PER_STEP):
        with step("decode"):
            for _ in range(_STAGES_PER_STEP):
                with stage("forward"):
                    pass


def resolving_behind_a_slow_task(torch: Any, simulator: Simulator, rounds: int) -> float:
    """Median microseconds for which resolving a finished step holds its thread, while a task holds up the queue."""
    recorder = switch.current_recorder()
    assert recorder is not None
    thread = recorder.local.thread
    slow = torch.Event(device="npu:0", enable_timing=True)
    costs = []
    for _ in range(rounds):
        with thread.lock:
            thread.busy = True  # so that nobody else resolves them
            whole_steps()
            torch.npu.synchronize()
            simulator.configure(dispatch_delay_ns=20_000_000)
            slow.record()
            while thread.pending:
                began = perf_counter_ns()
                recorder._resolver.resolve(thread, 1)
                costs.append(perf_counter_ns() - began)
            assert not slow.query(), "the task was no longer slow"
            simulator.configure(dispatch_delay_ns=0)
            thread.busy = False
        torch.npu.synchronize()
    return statistics.median(costs) / 1000


def measure(rounds: int) -> None:
    """Measure in this process, whose environment says whether the task queue is on."""
    simulator: Simulator | None = None
    with contextlib.suppress(ImportError):  # an installation without the tests: then there must be an NPU
        from tests.helpers.ascend.simulator import Simulator

        simulator = Simulator.load()
    import torch
    import torch_npu  # noqa: F401

    torch.npu.set_device(0)
    torch.npu.synchronize()
    timed = Rounds(torch.npu.synchronize, rounds)
    timed.time({_NULL: null_contexts, _OFF: stages})
    otel_npu.enable(otel_npu.Settings())
    with otel_npu.step("decode"), otel_npu.stage("forward"):
        pass
    in_step = otel_npu.step("decode")

    def open_step() -> None:  # the drain before a variant is the place for what is not timed
        nonlocal in_step
        torch.npu.synchronize()
        in_step.close()
        in_step = otel_npu.step("decode").open()

    timed._drain = open_step
    timed.time({_BARE: bare_records(torch), _STAGE: stages, _OLD: profile_execute_duration(torch)})
    in_step.close()
    timed._drain = torch.npu.synchronize
    timed.time({_WHOLE: whole_steps})
    if simulator is not None and os.environ.get("TASK_QUEUE_ENABLE") == "1":
        resolving_us = resolving_behind_a_slow_task(torch, simulator, rounds // 10)
        print(f"  resolving a finished step of {_STAGES_PER_STEP} behind a slow task: {resolving_us:.1f} us")
    otel_npu.disable()

    for name in timed.costs:
        print(f"  {name:<64}{timed.cost(name):>8.0f} ns")
    print(f"  {_STAGE} / {_BARE}: {timed.ratio(_STAGE, _BARE):.2f} (with its share: {timed.ratio(_WHOLE, _BARE):.2f})")
    print(f"  {_OLD} / {_STAGE}: {timed.ratio(_OLD, _STAGE):.1f} (with its share: {timed.ratio(_OLD, _WHOLE):.1f})")
    print(f"  {_OFF} / {_NULL}: {timed.ratio(_OFF, _NULL):.2f}", flush=True)


def main() -> None:
    """Measure with the task queue off and on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=500)
    parser.add_argument("--one-process", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one_process:
        measure(arguments.rounds)
        return
    for queue, name in (("0", "off"), ("1", "on")):
        print(f"task queue {name}, {arguments.rounds} rounds:", flush=True)
        subprocess.run(  # noqa: S603
            [sys.executable, "-m", "benchmarks.stage_cost", "--one-process", "--rounds", str(arguments.rounds)],
            env=os.environ
            | {"TASK_QUEUE_ENABLE": queue, "OTEL_TRACES_EXPORTER": "none", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
            check=True,
        )


if __name__ == "__main__":
    main()
