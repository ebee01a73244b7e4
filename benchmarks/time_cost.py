"""What knowing the time costs: in the relay a stage, in the worker a ping. Prints medians.

Run from the repository, on an NPU or, with the simulated runtime of the tests, without one:

    python -m benchmarks.time_cost

The relay's cost is that of its own code on real frames of a serving engine: feeding the clock, placing the stages,
and all of what makes spans of them. The worker's is that of `Npu.ping` on the real torch_npu binding.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import random
import statistics
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, Final

from otel_npu.relay.assembler import Assembler
from otel_npu.relay.reach import reaches
from otel_npu.relay.spans import span_limits
from otel_npu.relay.wall import WallClock
from otel_npu.wire import frames

if TYPE_CHECKING:
    from collections.abc import Callable

MS, US = 1_000_000, 1_000
_STAGES: Final = ("prepare_input", "forward", "attention", "post_process", "sample")
_PARENTS: Final = (-1, -1, 1, -1, -1)
_STEP_NS: Final = 30 * MS
_BUDGET_NS: Final = 100_000


def hello() -> frames.Hello:
    return frames.Hello(frames.PROTOCOL, 1, "host", "instance", "python", "", "", "npu", "Ascend910B3", 1000)


def steps(count: int) -> list[frames.Step]:
    """Steps enqueued up to 20 ms ahead of the device, whose clock drifts by 50 ppm; each 30th finds it idle."""
    rng = random.Random(1)  # noqa: S311 - a simulation
    made = []
    host_ns = perf_counter_ns()
    start_ns = host_ns

    def reading(at_ns: int) -> int:
        return 3 * 86_400 * 1_000_000_000 + round((at_ns - start_ns) * (1 + 50e-6))

    for number in range(1, count + 1):
        idle = number % 30 == 1
        enqueued_ns = host_ns - (15 * US if idle else rng.randrange(20 * MS))
        ends_ns = [host_ns + 2 * MS, host_ns + 22 * MS, host_ns + 10 * MS, host_ns + 25 * MS, host_ns + 28 * MS]
        begins_ns = [host_ns, ends_ns[0], ends_ns[0], ends_ns[1], ends_ns[3]]
        stages = [
            frames.Stage(
                name,
                parent,
                enqueued_ns + 10 * US * index,
                enqueued_ns + 10 * US * index + (25 * US if index == 1 else 8 * US),
                reading(begin_ns),
                reading(end_ns) - reading(begin_ns),
                0,
                0,
                None,
                None,
            )
            for index, (name, parent, begin_ns, end_ns) in enumerate(
                zip(_STAGES, _PARENTS, begins_ns, ends_ns, strict=True)
            )
        ]
        seen_ns = ends_ns[-1] + (50 * US if idle else rng.randrange(_STEP_NS))
        ids = number.to_bytes(16, "big"), number.to_bytes(8, "big"), b""
        closed_ns = stages[-1].exited_ns
        made.append(
            frames.Step(
                *ids, False, -1, False, number, "decode", enqueued_ns, closed_ns, seen_ns, None, None, [], {}, stages
            )
        )
        host_ns += _STEP_NS
    return made


def relay_costs(count: int) -> dict[str, float]:
    """Median nanoseconds a stage of each part."""
    encoded = [frames.encode(step) for step in steps(count)]
    assembler = Assembler(hello(), WallClock(), span_limits)
    spent: dict[str, list[float]] = {"feeding the clock": [], "placing": [], "all of the assembler": [], "decoding": []}

    def timed(what: str, function: Callable[..., object], *arguments: Any) -> Any:
        began = perf_counter_ns()
        result = function(*arguments)
        spent[what].append((perf_counter_ns() - began) / len(_STAGES))
        return result

    gc.collect()
    gc.disable()
    for packet in encoded:
        step = timed("decoding", frames.decode_frame, packet)
        reached, timeline = reaches(step.stages), assembler.timeline
        timed("feeding the clock", timeline.learn, reached, step.seen_ns)
        timed("placing", timeline.place, step, reached)
        timed("all of the assembler", assembler.step, step)
    gc.enable()
    costs = {what: statistics.median(times) for what, times in spent.items()}
    costs["the clock part: feeding and placing"] = costs["feeding the clock"] + costs["placing"]
    return costs


def ping_costs(count: int) -> tuple[float, float, float, int]:
    """Of a ping on the real binding: median, 99th percentile and bracket in nanoseconds; and how many failed."""
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    with contextlib.suppress(ImportError):  # an installation without the tests: then there must be an NPU
        from tests.helpers.ascend.simulator import Simulator

        Simulator.load()
    import torch
    import torch_npu  # noqa: F401

    from otel_npu.devices.npu import Npu

    torch.npu.set_device(0)
    device = Npu.open()
    device.ping(0, _BUDGET_NS)
    took, brackets, failed = [], [], 0
    for _ in range(count):
        began = perf_counter_ns()
        device.adopt_thread(0)
        ping = device.ping(0, _BUDGET_NS)
        if ping is not None:
            frames.encode(frames.Ping(0, *ping))
            brackets.append(ping.seen_ns - ping.before_ns)
        else:
            failed += 1
        took.append(perf_counter_ns() - began)
    percentile = statistics.quantiles(took, n=100)[98]
    return statistics.median(took), percentile, statistics.median(brackets), failed


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--pings", type=int, default=2000)
    arguments = parser.parse_args()
    print(f"relay, ns a stage (steps of {len(_STAGES)}), medians:")
    for what, cost in relay_costs(arguments.steps).items():
        print(f"  {what:<40}{cost:>8.0f}")
    median, percentile, bracket, failed = ping_costs(arguments.pings)
    print(f"worker, us a ping: median {median / US:.1f}, 99th percentile {percentile / US:.1f}")
    print(f"  its bracket: median {bracket / US:.1f} us; over the budget: {failed} of {arguments.pings}", flush=True)


if __name__ == "__main__":
    main()
