"""What it costs the relay to hold steps until it is known whether they were slow: memory and processor time.

    python -m benchmarks.holding_cost [--steps N]

Steps of seven stages whose engine is on another host, of which nobody says that they are slow: as many as are held at
most, and as many again, each of which takes the place of one. Against those that the engine tells of and is done with.
"""

from __future__ import annotations

import argparse
import functools
import time
import tracemalloc
from typing import TYPE_CHECKING, Any, Final

from otel_npu.drops import Drops
from otel_npu.relay.assembler import Assembler
from otel_npu.relay.client import Client
from otel_npu.relay.joiner import HELD_STAGES, Joiner
from otel_npu.relay.wall import WallClock
from otel_npu.wire import frames
from tests.helpers.built import hello, scheduled, stage, step, updated

if TYPE_CHECKING:
    from collections.abc import Callable

STAGES: Final = ("prepare_input", "forward", "post_process", "sample", "bookkeep", "eplb", "model_runner_output")
STEPS: Final = HELD_STAGES // len(STAGES)
"""So many are held at most."""
_MS: Final = 1_000_000


class Relay:
    """A relay's joiner with one engine and one worker; time stands still, so that nothing is over by itself."""

    def __init__(self) -> None:
        wall = WallClock()
        self.joiner = Joiner(wall, lambda _spans, _account: None, Drops(), now=lambda: 0.0)
        self._clients = [Client(), Client()]
        for client in self._clients:
            client.greeted = Assembler(hello(), wall, lambda: None)  # type: ignore[arg-type,return-value]

    def run(self, packet: bytes) -> None:
        """A worker tells of a step."""
        worker = self._clients[1]
        step = frames.decode_frame(packet)
        assert isinstance(step, frames.Step)
        worker.assembler.step(step, functools.partial(self.joiner.ran, worker))

    def take(self, frame: Any) -> None:
        """The engine tells something."""
        self.joiner.take(self._clients[0], frame)


def packet(number: int) -> bytes:
    """A step that was not chosen to be a trace."""
    began_ns = number * 10 * _MS
    stages = [
        stage(name=name, entered_ns=began_ns + index * _MS, exited_ns=began_ns + (index + 1) * _MS, device_ns=began_ns)
        for index, name in enumerate(STAGES)
    ]
    span_id, engine_span_id = (number + offset << 1 | 1 for offset in (1 << 40, 1))
    return frames.encode(
        step(
            number,
            trace_id=b"t" * 16,
            span_id=span_id.to_bytes(8, "big"),
            parent_span_id=engine_span_id.to_bytes(8, "big"),
            opened_ns=began_ns,
            closed_ns=began_ns + 8 * _MS,
            seen_ns=began_ns + 9 * _MS,
            rank=0,
            returns_output=True,
            stages=stages,
            kept=False,
        )
    )


def microseconds(steps: int, work: Callable[[], None]) -> float:
    """Processor time of it, of each step."""
    began = time.process_time()
    work()
    return (time.process_time() - began) / steps * 1e6


def main() -> None:
    """Print what it costs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS, help="how many; with fewer none gives way to another")
    steps = parser.parse_args().steps
    packets = [packet(number) for number in range(2 * steps)]

    def told(relay: Relay) -> None:
        for number in range(steps):
            span_id = (number + 1 << 1 | 1).to_bytes(8, "big")
            relay.take(scheduled(number, span_id=span_id, requests=[], tokens=[], prefills=[], kept=False))
            relay.run(packets[number])
            relay.take(updated(number, span_id=span_id, requests=[], new_tokens=[]))

    def held(relay: Relay, first: int) -> None:
        for each in packets[first : first + steps]:
            relay.run(each)

    alone = microseconds(steps, functools.partial(told, Relay()))
    relay = Relay()
    filling = microseconds(steps, functools.partial(held, relay, 0))
    full = microseconds(steps, functools.partial(held, relay, steps))
    tracemalloc.start()
    measured = Relay()
    held(measured, 0)
    memory, _ = tracemalloc.get_traced_memory()
    print(f"{steps:,} steps of {len(STAGES)} stages, which are held: {memory / 1e6:.1f} MB")
    print(f"processor time of a step that is held: {filling:.1f} us; where one gives way to it: {full:.1f} us")
    print(f"of one that its engine tells of, with what that says: {alone:.1f} us")


if __name__ == "__main__":
    main()
