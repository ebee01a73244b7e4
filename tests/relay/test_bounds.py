"""What a client may make the relay hold is bounded, and given back when it leaves; nobody else pays for it."""

from __future__ import annotations

import gc
import os
import socket
import threading
from typing import TYPE_CHECKING

import pytest

from otel_npu import semconv
from otel_npu.relay import clients as clients_module
from otel_npu.relay import ledger as ledger_module
from otel_npu.relay.placing import MAX_DEVICES
from otel_npu.relay.server import Server
from otel_npu.wire import frames, rendezvous
from tests.helpers.built import request, request_end, scheduled, stage, step
from tests.helpers.traced import eventually
from tests.relay import test_server

if TYPE_CHECKING:
    from pathlib import Path

    import msgspec

    from otel_npu.relay.clients import Connected
    from tests.relay.test_server import Client, Relay

relay = test_server.relay

KIB = 1024


@pytest.fixture(autouse=True)
def little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "MAX_BYTES_PER_CLIENT", 400 * KIB)
    monkeypatch.setattr(ledger_module, "MAX_BYTES", 600 * KIB)


def ids() -> bytes:
    return os.urandom(8)


def a_stranger() -> frames.Step:
    """A rank's part of a step that no engine tells of."""
    return step(kept=False, parent_span_id=ids(), rank=0, stages=[stage() for _ in range(50)])


FLOODS = {
    "steps that never end": lambda number: scheduled(number, span_id=ids()),
    "requests that never end": lambda number: request(number, key=ids(), request_id="x" * 20_000),
    "ends of requests that nobody knows": lambda _: request_end(1, key=ids(), reason="r" * 20_000),
    "steps of ranks that no engine knows": lambda _: a_stranger(),
    "ranks without end": lambda number: step(kept=False, parent_span_id=b"p" * 8, rank=number),
}


@pytest.mark.parametrize("flood", FLOODS.values(), ids=FLOODS)
def test_what_one_client_makes_it_hold_is_bounded_and_costs_no_other(relay: Relay, flood: object) -> None:
    assert callable(flood)
    hostile, honest = relay.client().greet(), relay.client().greet()
    relay.run()
    for number in range(1, 2001):
        hostile.send(flood(number))
    assert not hostile.flush()  # something of it was lost
    [client] = [client for client in clients(relay) if client.account.held_bytes]
    assert client.account.held_bytes < 400 * KIB + 128 * KIB
    for number in range(10):
        honest.send(step(number))
    assert honest.flush()
    assert relay.exporter.steps() == list(range(10))
    assert relay.exporter.dropped(semconv.RELAY_FULL) > 0
    hostile.connection.close()
    eventually(lambda: held(relay) == 0, "everything is given back")


def clients(relay: Relay) -> list[Connected]:
    return list(relay.server._clients)


def held(relay: Relay) -> int:
    gc.collect()
    return relay.server._ledger.bytes


def test_reasons_that_nobody_knows_are_one(relay: Relay) -> None:
    client = relay.client().greet()
    relay.run()
    for number in range(300):
        client.send(step(number, kept=False, dropped={f"reason {number}": 1}))
    client.send(step(1))
    assert client.flush()
    assert relay.exporter.dropped(semconv.OTHER) == 300
    [(assembler,)] = [(each.assembler,) for each in clients(relay)]
    assert len(assembler._dropped) <= 1


def test_counts_do_not_grow_beyond_what_can_be_sent(relay: Relay) -> None:
    client = relay.client().greet()
    relay.run()
    for number in range(4):
        client.send(step(number, kept=False, dropped={semconv.QUEUE_FULL: 1 << 53}))
    client.send(step(4))
    assert client.flush()
    assert relay.exporter.dropped(semconv.QUEUE_FULL) == 1 << 53


def test_devices_are_bounded(relay: Relay) -> None:
    client = relay.client().greet()
    relay.run()
    for number in range(MAX_DEVICES + 10):
        client.send(frames.Ping(number, 1000, 900, 1100))
    client.send(step(1))
    client.flush()
    assert relay.exporter.dropped(semconv.BAD_FRAME) == 10
    [served] = clients(relay)
    assert len(served.assembler.timeline._clocks) == MAX_DEVICES


def test_the_log_has_a_few_lines_of_bad_frames_however_many_there_are(
    relay: Relay,
    caplog: pytest.LogCaptureFixture,
) -> None:
    bad = relay.client().greet()
    relay.run()
    for number in range(500):
        bad.send(step(1, links=[b"l" * (number + 26)]))  # each wrong in its own way
    bad.send(step(2))
    bad.flush()
    assert relay.exporter.dropped(semconv.BAD_FRAME) == 500
    assert len([record for record in caplog.records if "can't be read" in record.getMessage()]) == 5


def test_a_line_of_the_log_is_short_whatever_a_frame_holds(relay: Relay, caplog: pytest.LogCaptureFixture) -> None:
    client = relay.client().greet()
    relay.run()
    unknown: msgspec.Struct = frames.Flushed(1, complete=True)
    client.send(frames.encode(unknown).replace(b"flushed", b"x" * 7))
    client.flush()
    assert all(len(record.getMessage()) < 400 for record in caplog.records)


def test_more_flushes_than_anybody_waits_for_are_refused(relay: Relay) -> None:
    client: Client = relay.client().greet()
    relay.exporter.hold()
    relay.run()
    client.send(step(1))
    for number in range(200):
        client.ask_to_flush(number)
    eventually(lambda: len(relay.server._flushes) == 64, "so many wait")
    relay.exporter.released.set()
    answers = [client.flushed() for _ in range(64)]
    assert len({answer.number for answer in answers}) == 64


def test_who_connects_and_says_nothing_makes_room_for_who_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(clients_module, "MAX_CLIENTS", 4)
    path = tmp_path / "s.sock"
    exporter = test_server.Exporter()
    with rendezvous.listen(path) as listener:
        server = Server([exporter], [listener], stay=True)
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            honest = test_server.Client(connected(path), 1).greet()
            assert honest.flush()
            silent = [connected(path) for _ in range(20)]
            late = test_server.Client(connected(path), 2).greet()
            late.send(step(1))
            assert late.flush()
            honest.send(step(2))
            assert honest.flush()
            assert exporter.steps() == [1, 2]
            assert len(server._clients) == 4
            for connection in (honest.connection, late.connection, *silent):
                connection.close()
        finally:
            server.stop()
            thread.join()


def connected(path: Path) -> socket.socket:
    connection = eventually(lambda: connection_to(path), "there is room in the backlog")
    assert isinstance(connection, socket.socket)
    return connection


def connection_to(path: Path) -> socket.socket | None:
    try:
        return rendezvous.connect(path)
    except BlockingIOError:
        return None
