"""What is on the ledger is what is really held: limits in bytes hold only as far as that is true."""

from __future__ import annotations

import gc
import os
import tracemalloc
from typing import TYPE_CHECKING

import pytest

from otel_npu.relay.account import Account
from otel_npu.relay.ledger import MAX_BYTES, MAX_BYTES_PER_CLIENT, Ledger
from tests.helpers.built import request, scheduled, stage, step
from tests.relay import test_server

if TYPE_CHECKING:
    from otel_npu.wire.frames import Request
    from tests.relay.test_server import Relay

relay = test_server.relay

COUNT = 1500

HELD = {
    "requests": lambda number: request(number, key=os.urandom(8)),
    "steps of an engine": lambda number: scheduled(number, span_id=os.urandom(8)),
    "steps of a rank": lambda number: step(
        number, kept=False, parent_span_id=os.urandom(8), rank=0, stages=[stage() for _ in range(7)]
    ),
}


@pytest.mark.parametrize("frame", HELD.values(), ids=HELD)
def test_what_frames_and_what_is_made_of_them_take_is_on_the_ledger(relay: Relay, frame: object) -> None:
    assert callable(frame)
    client = relay.client().greet()
    relay.run()
    assert client.flush()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0] - relay.server._ledger.bytes
        for number in range(1, COUNT + 1):
            client.send(frame(number))
        assert client.flush()
        gc.collect()
        taken, on_ledger = tracemalloc.get_traced_memory()[0] - before, relay.server._ledger.bytes
    finally:
        tracemalloc.stop()
    assert on_ledger > COUNT * 500  # they are held
    assert taken < 1.2 * on_ledger


def test_two_who_make_it_hold_all_that_it_may_leave_room_for_others() -> None:
    ledger = Ledger()
    kept: list[Request] = []

    def fill(account: Account) -> int:
        while ledger.has_room(account, frame := request(len(kept) + 1)):
            kept.append(frame)
            ledger.hold(account, frame, 200_000)
        return account.held_bytes

    assert fill(Account()) >= MAX_BYTES_PER_CLIENT
    fill(Account())
    assert ledger.bytes < MAX_BYTES
    assert fill(Account()) > 1_000_000
    fill(Account())
    while ledger.has_room(Account(), request(1)):
        fill(Account())
    assert ledger.bytes < MAX_BYTES + 1_000_000
