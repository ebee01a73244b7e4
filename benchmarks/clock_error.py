"""How far device spans are placed from the truth, and how far they say they may be: figures and a plot.

Run from the root of the repository: ``python -m benchmarks.clock_error``. It simulates a serving engine on a
fake clock, prints figures for several drifts, and draws one drifting run with a device reset in its middle
into ``benchmarks/clock_error.svg``.
"""

from __future__ import annotations

import random
import time
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING, NamedTuple

from otel_npu.relay.clock import DeviceClock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

S, MS, US = 1_000_000_000, 1_000_000, 1_000
HOST_START_NS = 86_400 * S


class Observation(NamedTuple):
    """What the relay learns, or asks, in the order in which it does."""

    kind: str
    """`lower`, `upper`, or `at`: where is it?"""
    device_ns: int
    """A reading of the device's clock, truncated to microseconds."""
    host_ns: int
    """When it was enqueued or seen done, on the host's monotonic clock."""
    true_ns: int
    """When it happened on the device, on the host's monotonic clock."""


class Sample(NamedTuple):
    """One placed device time."""

    host_ns: int
    error_ns: int
    uncertainty_ns: int


def drifting(ppm: float, reset_at_ns: int | None = None) -> Callable[[int], int]:
    """A device's clock: its reading at a host time. It drifts, and starts again from 0 at `reset_at_ns`."""

    def reading(host_ns: int) -> int:
        since, start = HOST_START_NS, 3 * 86_400 * S
        if reset_at_ns is not None and host_ns >= reset_at_ns:
            since, start = reset_at_ns, 0
        elapsed = host_ns - since
        return start + elapsed + round(elapsed * ppm * 1e-6)

    return reading


def engine(
    reading: Callable[[int], int],
    seconds: int,
    *,
    pings: bool = True,
    one_sided: bool = False,
    step_ms: int = 60,
    seed: int = 1,
) -> Iterator[Observation]:
    """An engine that keeps its device busy.

    Steps are enqueued 0 to 50 ms before the device gets to them, and seen done 0.05 to 20 ms after it. Once a
    second the queue has run empty: the step then starts 10 to 20 us after it was enqueued, and is seen done
    20 to 100 us after its end. A ping, once a second, is bracketed by 21 to 67 us, its event anywhere within
    (or, if `one_sided`, in the last tenth).
    """
    rng = random.Random(seed)  # noqa: S311 - a simulation

    def observe(kind: str, true_ns: int, host_ns: int) -> Observation:
        return Observation(kind, reading(true_ns) // US * US, host_ns, true_ns)

    now, end = HOST_START_NS, HOST_START_NS + seconds * S
    next_idle = next_ping = now
    while now < end:
        idle = now >= next_idle
        backlog = 0 if idle else rng.randrange(50 * MS)
        enqueued, start = now - backlog, now + rng.randint(10 * US, 20 * US)
        done = start + rng.randint(step_ms * MS // 2, step_ms * MS * 3 // 2)
        seen = done + (rng.randint(20 * US, 100 * US) if idle else rng.randint(50 * US, 20 * MS))
        if idle:
            next_idle += S
        if pings and now >= next_ping:
            next_ping += S
            bracket = rng.randint(21 * US, 67 * US)
            begin = rng.randint(start, done)
            event = begin + int(bracket * (rng.uniform(0.9, 1.0) if one_sided else rng.uniform(0.05, 0.95)))
            yield observe("lower", event, begin)
            yield observe("upper", event, begin + bracket)
        yield observe("lower", start, enqueued)
        yield observe("upper", done, seen)
        yield observe("at", start, enqueued)
        yield observe("at", done, enqueued)
        now = done + rng.randint(5 * US, 200 * US)


def place(observations: Iterator[Observation], clock: DeviceClock | None = None) -> list[Sample]:
    """Feed a clock with what `engine` yields; every device time that it placed."""
    clock = clock or DeviceClock(resolution_ns=US)
    samples = []
    for kind, device_ns, host_ns, true_ns in observations:
        if kind == "lower":
            clock.lower(device_ns, host_ns)
        elif kind == "upper":
            clock.upper(device_ns, host_ns)
        elif placement := clock.at(device_ns, host_ns):
            samples.append(Sample(true_ns, placement.host_ns - true_ns, placement.uncertainty_ns))
    return samples


class Figures(NamedTuple):
    """What a run shows, in microseconds."""

    median_error: float
    p99_error: float
    max_error: float
    median_uncertainty: float
    within: float
    """The share of samples whose truth lies within the stated uncertainty."""


def figures(samples: list[Sample]) -> Figures:
    """Sum up a run."""
    errors = [abs(sample.error_ns) / US for sample in samples]
    return Figures(
        median(errors),
        quantiles(errors, n=100)[98],
        max(errors),
        median(sample.uncertainty_ns / US for sample in samples),
        sum(abs(sample.error_ns) <= sample.uncertainty_ns for sample in samples) / len(samples),
    )


def cost() -> dict[str, float]:
    """Nanoseconds a call, over a run of 10 minutes; the loop's own cost is taken off."""
    spent = {"lower": 0, "upper": 0, "at": 0}
    calls = dict.fromkeys(spent, 0)
    clock = DeviceClock(resolution_ns=US)
    call: dict[str, Callable[[int, int], object]] = {
        "lower": clock.lower,
        "upper": clock.upper,
        "at": clock.at,
    }
    timer = time.perf_counter_ns
    empty = min(-timer() + timer() for _ in range(10_000))
    for kind, device_ns, host_ns, _ in engine(drifting(150), 600, step_ms=20):
        function = call[kind]
        begin = timer()
        function(device_ns, host_ns)
        spent[kind] += timer() - begin - empty
        calls[kind] += 1
    return {kind: spent[kind] / calls[kind] for kind in spent}


def draw(samples: list[Sample], title: str) -> str:
    """Error and uncertainty over time as SVG: the first as dots, the second as a band around zero."""
    width, height, left, top, bottom, limit = 960, 400, 60, 40, 50, 40.0
    start, end = samples[0].host_ns, samples[-1].host_ns
    half = (height - top - bottom) / 2

    def x(host_ns: int) -> float:
        return round(left + (host_ns - start) / (end - start) * (width - left - 20), 1)

    def y(us: float) -> float:
        return round(top + half - max(-limit, min(limit, us)) / limit * half, 1)

    shown = samples[:: max(1, len(samples) // 1500)]
    band = [(x(s.host_ns), y(s.uncertainty_ns / US)) for s in shown]
    band += [(x(s.host_ns), y(-s.uncertainty_ns / US)) for s in reversed(shown)]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">',
        f'<rect width="{width}" height="{height}" fill="white"/><g font-size="12">',
        f'<text x="{left}" y="24" font-size="15">{title}</text>',
        f'<polygon points="{" ".join(f"{a},{b}" for a, b in band)}" fill="#cfe3f5"/>',
    ]
    for us in range(-40, 41, 10):
        parts.append(f'<path d="M{left} {y(us)}H{width - 20}" stroke="#999" stroke-width="{0.3 if us else 1}"/>')
        parts.append(f'<text x="{left - 8}" y="{y(us) + 4}" text-anchor="end">{us}</text>')
    for minute in range(0, (end - start) // (60 * S) + 1, 5):
        a = x(start + minute * 60 * S)
        parts.append(f'<text x="{a}" y="{height - bottom + 18}" text-anchor="middle">{minute}</text>')
    dots = "".join(f"M{x(s.host_ns)} {y(s.error_ns / US)}h.01" for s in shown)
    parts.append(f'<path d="{dots}" stroke="#b03a2e" stroke-width="2" stroke-linecap="round"/>')
    parts.append(
        f'<text x="{left}" y="{height - 10}">Microseconds over minutes. Dots: placed minus true time. '
        f"Band: the stated uncertainty, cut at {limit:.0f} us.</text></g></svg>"
    )
    return "\n".join(parts) + "\n"


def main() -> None:
    """Print the figures and draw the run."""
    print("30 minutes                       median    p99    max   uncertainty  within")
    for pings, one_sided in ((True, False), (True, True), (False, False)):
        for ppm in (0, 5, 50, 150):
            run = figures(place(engine(drifting(ppm), 1800, pings=pings, one_sided=one_sided)))
            name = "no pings" if not pings else "one-sided pings" if one_sided else "pings"
            print(
                f"{name:<16} {ppm:>4} ppm, error us {run.median_error:>7.1f} {run.p99_error:>6.1f} "
                f"{run.max_error:>6.1f}  {run.median_uncertainty:>12.1f}  {run.within:>6.2%}"
            )
    print("ns a call:", {kind: round(ns) for kind, ns in cost().items()})
    clock = DeviceClock(resolution_ns=US)
    reset_at_ns = HOST_START_NS + 900 * S
    samples = place(engine(drifting(150, reset_at_ns=reset_at_ns), 1800), clock)
    run = figures(samples)
    print(f"with a reset: {clock.resets} seen, {run.within:.4%} within, 99th percentile {run.p99_error:.1f} us")
    picture = Path(__file__).with_suffix(".svg")
    picture.write_text(draw(samples, "Placing device spans: 150 ppm drift, a ping a second, device reset after 15 min"))
    print(picture)


if __name__ == "__main__":
    main()
