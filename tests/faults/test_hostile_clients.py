"""Beside clients that send rubbish without end, an honest one is served whole, and the relay stays small and brief."""

from __future__ import annotations

import contextlib
import random
import resource
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from otel_npu.wire import frames
from tests.faults.effort import times
from tests.helpers import built
from tests.helpers.traced import Program, Programs, eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.helpers.receiver import Receiver

pytestmark = pytest.mark.slow

MAX_GROWTH_KIB = 64 * 1024
MAX_LINES = 200


@pytest.fixture
def programs(tmp_path: Path) -> Iterator[Programs]:
    with Programs(tmp_path) as running:
        yield running


@pytest.fixture
def honest(programs: Programs, receiver: Receiver) -> Program:
    """A program whose relay is to be harmed."""
    worker = programs.start(receiver.grpc_environment)
    assert worker.ask("steps(1) and otel_npu.flush(60)") is True
    return worker


class Attacker:
    """Connections to the relay, and what they send; whoever reads too slowly is waited for."""

    def __init__(self, programs: Programs) -> None:
        [path] = programs.sockets
        self._path = str(path)
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Attacker:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def connect(self) -> socket.socket | None:
        """One more connection, if the relay takes it."""
        connection = self._open.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        connection.settimeout(10)
        try:
            connection.connect(self._path)
        except OSError:
            connection.close()
            return None
        return connection

    def send(self, packets: Iterator[bytes]) -> None:
        """Send these, each time the relay hangs up by a new connection."""
        connection = self.connect()
        for packet in packets:
            try:
                assert connection is not None
                connection.send(packet)
            except (OSError, AssertionError):
                if connection is not None:
                    connection.close()
                connection = self.connect()
                if connection is not None:
                    with contextlib.suppress(OSError):
                        connection.send(frames.encode(built.hello(pid=66)))


def relay_kib(programs: Programs) -> int:
    status = Path(f"/proc/{programs.relay()}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))


def assert_unharmed(programs: Programs, honest: Program, receiver: Receiver, before_kib: int, relay: int) -> None:
    """The honest client's steps arrive, all; the relay is the same, has not grown much, and has said little."""
    known = len(receiver.spans)
    assert honest.ask("steps(200) and otel_npu.flush(60)") is True
    arrived = [span for span in receiver.spans[known:] if span.resource["process.pid"] == honest.pid]
    assert len(arrived) == 400
    assert programs.relay() == relay
    assert relay_kib(programs) - before_kib < MAX_GROWTH_KIB
    assert len(programs.log.splitlines()) < MAX_LINES


def mutated(count: int) -> Iterator[bytes]:
    """Frames of every kind with some of their bytes changed, lost or doubled."""
    rng = random.Random(1)
    made = [
        *(built.hello(), built.step(1), built.unfinished(), built.request(), built.scheduled(), built.updated()),
        *(built.request_end(), frames.Ping(0, 1, 2, 3), frames.Flush(1, 0.1)),
    ]
    whole = [frames.encode(frame) for frame in made]
    yield whole[0]
    for _ in range(count):
        packet = bytearray(rng.choice(whole))
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(packet))
            match rng.randrange(4):
                case 0:
                    packet[at] = rng.randrange(256)
                case 1:
                    del packet[at : at + rng.randint(1, 8)]
                case 2:
                    packet[at:at] = packet[at : at + rng.randint(1, 8)]
                case _:
                    packet[at] ^= 1 << rng.randrange(8)
            packet = packet or bytearray(b"\0")
        yield bytes(packet)


def test_mutated_frames(programs: Programs, honest: Program, receiver: Receiver) -> None:
    before_kib, relay = relay_kib(programs), programs.relay()
    with Attacker(programs) as attacker:
        attacker.send(mutated(times(20_000, 200_000)))
        assert_unharmed(programs, honest, receiver, before_kib, relay)
    assert_unharmed(programs, honest, receiver, before_kib, relay)


def legal(count: int) -> Iterator[bytes]:
    """Frames that are in order, of a client that never comes to an end."""
    yield frames.encode(built.hello(pid=66))
    for number in range(1, count):
        yield frames.encode(built.request(number))
        yield frames.encode(built.scheduled(number, trace_id=b"", dropped={f"reason {number}": 1}))
        yield frames.encode(built.step(number, trace_id=b"", span_id=b"", stages=[built.stage(device_index=number)]))


def test_a_flood_of_frames_that_are_in_order(programs: Programs, honest: Program, receiver: Receiver) -> None:
    before_kib, relay = relay_kib(programs), programs.relay()
    with Attacker(programs) as attacker:
        attacker.send(legal(times(10_000, 200_000)))
        assert_unharmed(programs, honest, receiver, before_kib, relay)
    assert_unharmed(programs, honest, receiver, before_kib, relay)


def test_connections_that_never_say_a_word(programs: Programs, honest: Program, receiver: Receiver) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(times(1_000, 2_000), (hard if hard > 0 else 1 << 20) - 200)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted + 200), hard))
    try:
        before_kib, relay = relay_kib(programs), programs.relay()
        with Attacker(programs) as attacker:
            for _ in range(wanted):
                attacker.connect()
            assert_unharmed(programs, honest, receiver, before_kib, relay)
        eventually(lambda: honest.ask("steps(1) and otel_npu.flush(60)"), "it is served afterwards")
        newcomer = programs.start(
            receiver.grpc_environment | {"OTEL_NPU_SESSION": honest.ask("os.environ['OTEL_NPU_SESSION']")}
        )
        assert newcomer.ask("steps(1) and otel_npu.flush(60)") is True
        assert programs.relay() == relay
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
