"""How many stages a second the relay takes on one processor: without metrics, with them, and with all steps kept.

    python -m benchmarks.relay_capacity [--seconds S]

A relay of its own process on a processor of its own; this process sends what an engine and eight workers would, made
before. It keeps up if what was sent is read within half a second of the end. As a relay gives its time to whoever else
runs on that processor, what one processor takes is also computed from its processor time. Where every step is kept as a
trace, each stage is a span, and so is each rank's step and the engine's: which of them are exported is told, and where
it does not keep up, what gave way.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from benchmarks.relay_cost import RANKS, STAGES, Serving, connected, ran, relay_seconds
from benchmarks.vllm_cost import sink
from otel_npu.looking.session import Connection
from otel_npu.wire import frames
from tests.helpers.built import scheduled, updated
from tests.helpers.receiver import Receiver

if TYPE_CHECKING:
    from collections.abc import Iterator

    from otel_npu.wire.looking import Session

RATES: Final = (5_000, 10_000, 20_000, 30_000, 45_000, 60_000)
MODES: Final = (
    ("without metrics", "none", False),
    ("with metrics, exported every second", "otlp", False),
    ("every step kept as a trace", "none", True),
)
_MS: Final = 1_000_000
_QUIET: Final = 0.05
ENGINE: Final = -1


def packets(serving: Serving, rate: int, seconds: float, first: int, *, kept: bool) -> Iterator[tuple[int, int, bytes]]:
    """When each packet is due, in nanoseconds from the start, of which rank it is (or of the engine), and its bytes."""
    began = time.perf_counter_ns()
    steps = round(rate * seconds / len(STAGES) / RANKS)
    every_ns = round(seconds * 1e9 / steps)
    group = max(1, round(50 * _MS / every_ns))
    for start in range(0, steps, group):
        for rank in range(len(serving.workers)):
            raw = [
                msgspec.Raw(frames.encode(ran(first + number, rank, began + number * every_ns, kept=kept)))
                for number in range(start, min(steps, start + group))
            ]
            yield (start + group) * every_ns, rank, frames.encode(frames.Several(raw))
        for number in range(start, min(steps, start + group)):
            at_ns = began + number * every_ns
            told = scheduled(
                first + number,
                kept=kept,
                opened_ns=at_ns - 9 * _MS,
                scheduled_ns=at_ns - 9 * _MS,
                ranks=len(serving.workers),
            )
            yield (start + group) * every_ns, ENGINE, frames.encode(told)
            yield (start + group) * every_ns, ENGINE, frames.encode(updated(first + number, closed_ns=at_ns))


def run(
    serving: Serving, looking: Connection, receiver: Receiver, rate: int, seconds: float, first: int, *, kept: bool
) -> str:
    """Send at this rate, and say how the relay did."""
    made, resolved, state = list(packets(serving, rate, seconds, first, kept=kept)), _resolved(receiver), looking.ask()
    before, began = relay_seconds(serving.pid), time.perf_counter_ns()
    for due_ns, rank, packet in made:
        wait_ns = began + due_ns - time.perf_counter_ns()
        if wait_ns > 0:
            time.sleep(wait_ns * 1e-9)
        (serving.engine if rank == ENGINE else serving.workers[rank]).send(packet)
    late = (time.perf_counter_ns() - began) * 1e-9 - seconds
    time.sleep(0.5)
    busy, at = relay_seconds(serving.pid), time.monotonic()
    time.sleep(_QUIET * 4)
    still = (relay_seconds(serving.pid) - busy) / (time.monotonic() - at)
    while still > 0.5:
        time.sleep(0.2)
        busy, at = relay_seconds(serving.pid), time.monotonic()
        time.sleep(0.2)
        still = (relay_seconds(serving.pid) - busy) / (time.monotonic() - at)
        late += 0.4
    used = relay_seconds(serving.pid) - before
    time.sleep(1.5)  # the relay tells once a second
    arrived = _resolved(receiver) - resolved
    stages = (arrived or rate * seconds / len(STAGES)) * len(STAGES)
    how = "keeps up"
    keeps_up = late < 0.5 and stages >= 0.99 * rate * seconds
    if not keeps_up:
        how = f"{late:.1f} s late, {stages / rate / seconds:.0%} read"
    how = f"{how}; {_megabytes(serving.pid):.0f} MB"
    if kept:
        how = f"{how}; {_exported(looking, state, rate, seconds)}"
    return (
        f"{rate:7,} stages a second: {used / stages * 1e6:5.1f} us of processor each, one takes {stages / used:7,.0f}; "
        f"{how}"
    )


def _exported(looking: Connection, before: Session, rate: int, seconds: float) -> str:
    """How many spans that was a second, how many of them were exported, and why not all, once no more come."""
    spans = rate * seconds / len(STAGES) * (len(STAGES) + 1) + rate * seconds / len(STAGES) / RANKS
    exported, now = -1, looking.ask()
    while now.exported_spans > exported:
        exported = now.exported_spans
        time.sleep(2.5)
        now = looking.ask()
    left_out = {
        reason: count - before.dropped.get(reason, 0)
        for reason, count in now.dropped.items()
        if count > before.dropped.get(reason, 0)
    }
    share = (now.exported_spans - before.exported_spans) / spans
    return f"{spans / seconds:,.0f} spans a second, {share:.1%} exported, left out: {left_out or 'nothing'}"


def _resolved(receiver: Receiver) -> float:
    """How many steps the relay has taken, where it tells; else 0."""
    latest: dict[object, float] = {}
    for point in receiver.points("npu.steps.resolved"):
        latest[point.attributes.get("npu.rank")] = point.value
    return sum(latest.values())


def _megabytes(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="how long to send at each rate")
    seconds = parser.parse_args().seconds
    cpus = sorted(os.sched_getaffinity(0))
    for what, metrics, kept in MODES:
        with tempfile.TemporaryDirectory(prefix="bench-") as folder, Receiver() as receiver, sink() as unread:
            environment = {
                **receiver.grpc_environment,
                "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": unread,
                "OTEL_METRICS_EXPORTER": metrics,
                "OTEL_METRIC_EXPORT_INTERVAL": "1000",
            }
            path = Path(folder, "s.sock")
            serving = Serving(path, environment)
            try:
                with Connection(path.name, connected(path)) as looking:
                    for task in Path(f"/proc/{serving.pid}/task").iterdir():
                        os.sched_setaffinity(int(task.name), {cpus[-1]})
                    os.sched_setaffinity(0, set(cpus[:-1]) or set(cpus))
                    serving.ping()
                    print(f"{what}:", flush=True)
                    first = 1
                    for rate in RATES:
                        print(run(serving, looking, receiver, rate, seconds, first, kept=kept), flush=True)
                        first += 1_000_000
            finally:
                os.sched_setaffinity(0, set(cpus))
                serving.close()


if __name__ == "__main__":
    main()
