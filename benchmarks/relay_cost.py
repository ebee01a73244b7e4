"""What the relay costs the host it shares with a server: processor time, idle and serving, and of each thing it does.

    python -m benchmarks.relay_cost [--seconds S] [--metrics]

A relay of its own process, which exports to a receiver here; engine and workers are played by this process, which
sends what theirs would. What is told is the relay's processor time, all threads together.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from otel_npu.wire import frames, rendezvous
from tests.helpers.built import hello, request, request_end, scheduled, stage, step, updated
from tests.helpers.receiver import Receiver
from tests.helpers.traced import eventually

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator

RANKS: Final = 8
STAGES: Final = ("prepare_input", "forward", "post_process", "sample", "bookkeep", "eplb", "model_runner_output")
STEPS_A_SECOND: Final = 100
KEPT_A_SECOND: Final = 2
REQUESTS: Final = 16
"""So many run at once."""
REQUEST_STEPS: Final = 200
PACKET_STEPS: Final = 5
"""A worker's steps at this rate in one packet, and an engine's: each sends every 50 ms."""
_QUIET_SECONDS: Final = 0.03
_MS: Final = 1_000_000
_TRACE: Final = b"t" * 16


def relay_seconds(pid: int) -> float:
    """The processor time of all of a process's threads so far, in seconds."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) * 1e-9


class Serving:
    """An engine of so many ranks and its front end, as its relay sees them."""

    def __init__(self, path: Path, environment: dict[str, str], ranks: int = RANKS) -> None:
        first, relay, _ = rendezvous.connect_or_start(path, environment)
        assert relay is not None
        self.relay = relay
        self.engine = first
        self.front_end, *self.workers = (connected(path) for _ in range(1 + ranks))
        for number, connection in enumerate((self.engine, self.front_end, *self.workers)):
            _send(connection, hello(pid=1000 + number, device_kind="npu"))
        self.pid: int = eventually(lambda: relay.pid, "the relay says which process it is")
        self._number = 0
        self._waiting: list[list[frames.Step]] = [[] for _ in self.workers]
        self._deferred: list[frames.Scheduled | frames.Updated] = []
        self._like: tuple[bytes, list[int]] = b"", []
        """The last step that was listed, and its requests if all of them decode."""
        self._running: dict[int, int] = {}
        self._next_request = 0

    def close(self) -> None:
        """Hang up."""
        for connection in (self.engine, self.front_end, *self.workers):
            connection.close()
        self.relay.wait(10)
        self.relay.close()

    def ping(self) -> None:
        """Each worker looks at its device's clock."""
        for worker in self.workers:
            now = time.perf_counter_ns()
            _send(worker, frames.Ping(0, now, now - 10_000, now + 10_000))

    def step(self, *, kept: bool, requests: int = REQUESTS) -> None:
        """One step of all ranks."""
        self._number += 1
        number, now = self._number, time.perf_counter_ns()
        while len(self._running) < requests:
            self._next_request += 1
            self._running[self._next_request] = 0
            arrived = time.time_ns()
            _send(self.engine, request(self._next_request, trace_id=os.urandom(16), arrived_unix_ns=arrived))
        numbers = list(self._running) if requests else []
        prefills = [not self._running[each] for each in numbers]
        repeated = bool(numbers) and self._like[1] == numbers
        lists = {"like": self._like[0]} if repeated else {"requests": numbers, "prefills": prefills}
        now_scheduled = scheduled(
            number,
            kept=kept,
            opened_ns=now - 9 * _MS,
            scheduled_ns=now - 9 * _MS + 100_000,
            ranks=len(self.workers),
            total_tokens=max(1, len(numbers)),
            total_requests=len(numbers),
            tokens=[] if repeated else [1] * len(numbers),
            **lists,
        )
        if not repeated:
            self._like = now_scheduled.span_id, [] if any(prefills) else numbers
        self._deferred.append(now_scheduled)
        for rank, (worker, waiting) in enumerate(zip(self.workers, self._waiting, strict=True)):
            waiting.append(ran(number, rank, now, kept=kept))
            if len(waiting) == PACKET_STEPS:
                _send(worker, _together(waiting))
        finished = []
        for each in numbers:
            self._running[each] += 1
            if self._running[each] == REQUEST_STEPS:
                finished.append(each)
                del self._running[each]
        outputs = {"requests": numbers, "new_tokens": [1] * len(numbers), "finished": finished}
        self._deferred.append(updated(number, closed_ns=now, **(outputs if finished else {"each": 1})))
        if finished or len(self._deferred) >= 2 * PACKET_STEPS:
            _send(self.engine, _together(self._deferred))
        for each in finished:
            _send(self.front_end, request_end(each, ended_unix_ns=time.time_ns(), output_tokens=REQUEST_STEPS))


def _together(waiting: list[Any]) -> frames.Several:
    """All of them in one packet; none waits any more."""
    packet = frames.Several([msgspec.Raw(frames.encode(each)) for each in waiting])
    waiting.clear()
    return packet


def connected(path: Path) -> socket.socket:
    """A connection to the relay there."""
    connection = rendezvous.connect(path)
    assert connection is not None
    return connection


def _send(connection: socket.socket, frame: Any) -> None:
    connection.setblocking(True)
    connection.send(frames.encode(frame))


def ran(number: int, rank: int, now: int, *, kept: bool) -> frames.Step:
    """A rank's step that ended just now."""
    at = now - 8 * _MS
    # Bounds of the device's clock are as good as a stage is launched on time and seen in time.
    delays = [20_000 + int(random.expovariate(1 / 200_000)) for _ in STAGES]
    stages = [
        stage(
            name=name,
            entered_ns=at + index * _MS,
            exited_ns=at + index * _MS + 200_000,
            device_ns=at + index * _MS + delays[index],
            duration_ns=700_000,
        )
        for index, name in enumerate(STAGES)
    ]
    return step(
        number,
        kept=kept,
        trace_id=_TRACE,
        span_id=(rank << 48 | number).to_bytes(8, "big") if rank else (255 << 48 | number).to_bytes(8, "big"),
        parent_span_id=number.to_bytes(8, "big"),
        rank=rank,
        returns_output=rank == 0,
        opened_ns=at,
        closed_ns=at + 8 * _MS,
        seen_ns=now + int(random.expovariate(1 / 2_000_000)),
        stages=stages,
    )


def during(pid: int, seconds: float, work: Callable[[], None], every_seconds: float) -> float:
    """How much of a processor a process takes while this is done again and again."""
    before, began = relay_seconds(pid), time.monotonic()
    due = began
    while (now := time.monotonic()) < began + seconds:
        work()
        due += every_seconds
        time.sleep(max(0.0, due - now))
    return (relay_seconds(pid) - before) / (time.monotonic() - began)


def each(pid: int, count: int, work: Callable[[int], None]) -> float:
    """Seconds of processor time for each time that this is done, all its consequences included."""
    before = relay_seconds(pid)
    for number in range(count):
        work(number)
        if number % 50 == 49:  # as much as the relay reads at once
            time.sleep(0.05)
    return (_when_quiet(pid) - before) / count


def _when_quiet(pid: int) -> float:
    """Its processor time when it has read, made and exported all."""
    seconds = relay_seconds(pid)
    while True:
        time.sleep(3.0)  # nothing waits for longer
        before, seconds = seconds, relay_seconds(pid)
        if seconds - before < _QUIET_SECONDS:
            return seconds


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=10.0, help="how long to look at each state")
    parser.add_argument("--metrics", action="store_true", help="with metrics of every step too")
    arguments = parser.parse_args()
    seconds, metrics = arguments.seconds, {} if arguments.metrics else {"OTEL_METRICS_EXPORTER": "none"}
    with tempfile.TemporaryDirectory(prefix="bench-") as folder, Receiver() as receiver:
        serving = Serving(Path(folder, "s.sock"), {**receiver.grpc_environment, **metrics})
        try:
            for line in _measured(serving, seconds):
                print(line, flush=True)
        finally:
            serving.close()


def _measured(serving: Serving, seconds: float) -> Iterator[str]:
    steps = 0

    def serve() -> None:
        nonlocal steps
        steps += 1
        serving.step(kept=steps % (STEPS_A_SECOND // KEPT_A_SECOND) == 0)
        if steps % STEPS_A_SECOND == 0:
            serving.ping()

    during(serving.pid, 2.0, serve, 1 / STEPS_A_SECOND)  # everything is imported, and the clocks are known
    time.sleep(2)
    idle = during(serving.pid, seconds, serving.ping, 1.0)
    busy = during(serving.pid, seconds, serve, 1 / STEPS_A_SECOND)
    time.sleep(2)
    count = math.ceil(50 * seconds)
    bare = each(serving.pid, count, lambda _: serving.step(kept=False, requests=0))
    kept = each(serving.pid, count, lambda _: serving.step(kept=True, requests=0))
    served = each(serving.pid, count, lambda _: serving.step(kept=False))
    spans = RANKS * (len(STAGES) + 1) + 1
    us = 1e6
    yield f"idle, {RANKS} ranks that look at their clocks once a second: {idle:.2%} of a processor"
    yield f"serving {RANKS} ranks, {STEPS_A_SECOND} steps a second, {len(STAGES)} stages: {busy:.1%} of a processor"
    yield f"({KEPT_A_SECOND} steps a second are kept; {REQUESTS} requests at once, each of {REQUEST_STEPS} steps)"
    yield f"a step of one rank: {bare / RANKS * us:.0f} us, so {bare / RANKS / len(STAGES) * us:.1f} us a stage"
    yield f"a span of one that is kept: {(kept - bare) / spans * us:.0f} us more"
    yield f"a request in a step, its end included: {(served - bare) / REQUESTS * us:.1f} us"


if __name__ == "__main__":
    main()
