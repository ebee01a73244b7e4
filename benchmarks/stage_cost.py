"""Host cost of a captured stage on the real torch_npu binding, against what it is compared with. Prints the ratios.

Needs torch_npu; runs on an NPU or, with the simulated runtime of the tests, without one. Run from the repository:

    python -m benchmarks.stage_cost

Every variant runs in every round, in turn, so that a slower moment of the machine slows all of them; medians are
quoted. The task queue is drained outside of what is timed. Each setting of the queue has a process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import statistics
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

_STAGES = 200  # stages timed in one go; well below the task queue's 4096 entries
_STAGES_PER_STEP = 5


def _median_costs(variants: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Nanoseconds a stage of each variant: the median over the rounds."""
    costs: dict[str, list[float]] = {name: [] for name in variants}
    for variant in variants.values():
        variant()  # warm up
    gc.collect()
    gc.disable()
    for _ in range(rounds):
        for name, variant in variants.items():
            costs[name].append(variant() / _STAGES)
    gc.enable()
    return {name: statistics.median(values) for name, values in costs.items()}


def _timed(body: Callable[[], None], drain: Callable[[], None]) -> Callable[[], float]:
    def once() -> float:
        drain()
        began = time.perf_counter_ns()
        body()
        took = time.perf_counter_ns() - began
        drain()
        return took

    return once


def _bare_records(torch: Any) -> Callable[[], None]:
    """Two records on events that exist: the least that timing a stage can cost."""
    start = torch.Event(device="npu:0", enable_timing=True)
    end = torch.Event(device="npu:0", enable_timing=True)

    def body() -> None:
        for _ in range(_STAGES):
            start.record()
            end.record()

    return body


def _profile_execute_duration(torch: Any) -> Callable[[], None]:
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

    def body() -> None:
        for _ in range(_STAGES):
            with capture_async("forward"):
                pass
        captured.clear()

    return body


def _measure(rounds: int) -> None:
    try:
        from tests.ascend.simulator import Simulator  # noqa: PLC0415

        Simulator.load()
    except ImportError:
        pass  # an installation without the tests: then there must be an NPU
    import torch  # noqa: PLC0415

    import otel_npu  # noqa: PLC0415

    torch.npu.set_device(0)
    torch.npu.synchronize()
    drain = torch.npu.synchronize
    stage, step = otel_npu.stage, otel_npu.step

    def nothing() -> None:
        null = contextlib.nullcontext
        for _ in range(_STAGES):
            with null():
                pass

    def stages() -> None:
        for _ in range(_STAGES):
            with stage("forward"):
                pass

    off = _median_costs(
        {"nullcontext()": _timed(nothing, drain), "stage(), switched off": _timed(stages, drain)}, rounds
    )

    otel_npu.enable(otel_npu.Settings(steps_per_second=2.0))

    def steps() -> None:
        for _ in range(_STAGES // _STAGES_PER_STEP):
            with step("decode"):
                for _ in range(_STAGES_PER_STEP):
                    with stage("forward"):
                        pass

    def in_a_step() -> float:
        with step("decode"):
            return _timed(stages, drain)()

    costs = off | _median_costs(
        {
            "two bare records": _timed(_bare_records(torch), drain),
            "stage()": in_a_step,
            "stage(), with its share of a step of 5, resolved and sent": _timed(steps, drain),
            "ProfileExecuteDuration's way": _timed(_profile_execute_duration(torch), drain),
        },
        rounds,
    )
    for name, cost in costs.items():
        print(f"  {name:<60}{cost:>9.0f} ns")
    records, captured = costs["two bare records"], costs["stage()"]
    whole = costs["stage(), with its share of a step of 5, resolved and sent"]
    old = costs["ProfileExecuteDuration's way"]
    ratio = costs["stage(), switched off"] / costs["nullcontext()"]
    print(f"  stage() / two bare records: {captured / records:.2f} (with its share of a step: {whole / records:.2f})")
    print(f"  ProfileExecuteDuration's way / stage(): {old / captured:.1f} (with its share: {old / whole:.1f})")
    print(f"  switched off / nullcontext(): {ratio:.2f}", flush=True)
    otel_npu.disable()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--one-process", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one_process:
        _measure(arguments.rounds)
        return
    for queue, name in (("0", "off"), ("1", "on")):
        print(f"task queue {name}:", flush=True)
        environment = os.environ | {"TASK_QUEUE_ENABLE": queue, "OTEL_TRACES_EXPORTER": "none"}
        subprocess.run(  # noqa: S603
            [sys.executable, "-m", "benchmarks.stage_cost", "--one-process", "--rounds", str(arguments.rounds)],
            env=environment,
            check=True,
        )


if __name__ == "__main__":
    main()
