"""The link to the relay where the process has come to its limits: it is said once, and tried again."""

from __future__ import annotations

import errno
import gc
import os
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from otel_npu.capture.link import RelayLink
from otel_npu.drops import Drops
from otel_npu.settings import Settings
from otel_npu.wire import frames, rendezvous
from otel_npu.wire.channel import Channel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Linked:
    """A channel and the link that is to connect it."""

    def __init__(self, export: str) -> None:
        self.drops = Drops()
        self.channel = Channel(self._hello, self.drops)
        settings = Settings(export=export, environment={"OTEL_TRACES_EXPORTER": "none"})
        self.link = RelayLink(self.channel, settings, self.drops)

    def _hello(self) -> frames.Hello:
        return frames.Hello(frames.PROTOCOL, os.getpid(), "host", "instance", "", "", "", "cpu", "", 0)

    def flush(self) -> bool:
        self.channel.send(frames.encode(frames.Flush(1, 30.0)))
        return frames.decode_flushed(self.channel.receive(30.0)).complete


@pytest.fixture
def linked() -> Iterator[Callable[[str], Linked]]:
    made: list[Linked] = []

    def make(export: str) -> Linked:
        made.append(Linked(export))
        return made[-1]

    yield make
    for each in made:
        each.link.close(30.0)


def no_thread(_: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


def no_descriptor(*_: object) -> Any:
    raise OSError(errno.EMFILE, "Too many open files")


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize(
    ("what", "name", "fails", "why"),
    [
        (threading.Thread, "start", no_thread, "can't start new thread"),
        (socket, "socketpair", no_descriptor, "Too many open files"),
    ],
    ids=["threads", "descriptors"],
)
def test_in_process_it_is_a_line_and_tried_again_and_what_was_sent_meanwhile_is_exported(
    linked: Callable[[str], Linked],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    what: Any,
    name: str,
    fails: Any,
    why: str,
) -> None:
    gc.collect()  # what tests before this one have left
    before = descriptors()
    with monkeypatch.context() as limit:
        limit.setattr(what, name, fails)
        here = linked("inprocess")
        for _ in range(3):
            here.link._retry_at = 0.0
            here.link.keep()
        assert here.link.failing
        assert not here.channel.connected
    assert descriptors() <= before
    here.channel.send(frames.encode(frames.Ping(0, 1, 2, 3)))
    assert not here.channel.empty
    here.link._retry_at = 0.0
    here.link.keep()
    assert not here.link.failing
    assert here.flush()
    assert here.channel.empty
    assert here.drops.totals() == {}
    [line] = [record.getMessage() for record in caplog.records]
    assert line.startswith("no relay, so nothing is exported for now: ")
    assert line.endswith(why)


def test_the_pause_between_two_tries_grows(linked: Callable[[str], Linked], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "meet", no_descriptor)
    here = linked("relay")
    pauses = []
    for _ in range(8):
        here.link._retry_at = 0.0
        here.link.keep()
        pauses.append(here.link._retry_seconds)
    assert pauses == [4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0, 60.0]


def test_where_there_is_no_place_for_a_socket_spans_are_exported_from_here(
    linked: Callable[[str], Linked], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def nowhere(*_: object) -> Any:
        raise rendezvous.NoPlaceError("no socket can be made in /run; nor an abstract one: Operation not permitted")

    monkeypatch.setattr(rendezvous, "meet", nowhere)
    here = linked("relay")
    assert here.flush()
    assert not here.link.failing
    [line] = [record.getMessage() for record in caplog.records]
    assert line.startswith("no relay can be a process of its own here, so spans are exported from this one: no socket")


def test_a_fault_of_our_own_at_the_start_is_told_and_costs_the_spans_alone(
    linked: Callable[[str], Linked], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fault(*_: object) -> Any:
        raise ZeroDivisionError

    with monkeypatch.context() as patched:
        patched.setattr(rendezvous, "meet", fault)
        here = linked("relay")
    [record] = caplog.records
    assert record.getMessage() == "a fault of otel-npu's own at the start of the relay"
    assert not here.channel.connected
