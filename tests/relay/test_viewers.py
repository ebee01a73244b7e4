"""Whoever looks at a relay: is told who is here, gets what is sent, and may switch the others."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any

import pytest

from otel_npu import semconv
from otel_npu.relay import viewers
from otel_npu.relay.server import Server
from otel_npu.relay.switching import QUIET_SECONDS, Switching
from otel_npu.wire import frames, looking
from tests.helpers.built import hello, request, request_end, scheduled, stage, step
from tests.helpers.traced import eventually
from tests.relay.test_server import Client, Relay

if TYPE_CHECKING:
    from collections.abc import Iterator


class Looking:
    """One that looks."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.views: list[Any] = []

    def ask(self, *, follow: bool = False, protocol: int = frames.PROTOCOL) -> looking.Session:
        self._client.send(frames.Look(protocol, follow))
        view = self.next()
        while not isinstance(view, looking.Session):
            self.views.append(view)
            view = self.next()
        return view

    def next(self) -> Any:
        return looking.decode(self._client.connection.recv(looking.MAX_PACKET_BYTES))

    def seen(self) -> Any:
        """The next frame that is passed on, and whose it is."""
        view = self.views.pop(0) if self.views else self.next()
        assert isinstance(view, looking.Seen)
        return view.number, frames.decode_frame(bytes(view.packet))

    def switch(self, *, on: bool) -> None:
        self._client.send(frames.Switch(on))


@pytest.fixture
def relay() -> Iterator[Relay]:
    running = Relay()
    yield running
    running.end()


def test_it_is_told_who_is_here_and_what_was_left_out(relay: Relay) -> None:
    program, looks = relay.client(), Looking(relay.client())
    relay.run()
    program.send(hello(pid=7, service_name="vllm"))
    program.send(step(1, dropped={"queue_full": 3}))
    session = eventually(lambda: (found := looks.ask()).dropped and found, "the step was read")
    (process,) = session.processes
    assert (process.pid, process.service_name, process.on) == (7, "vllm", True)
    assert session.dropped == {"queue_full": 3}


def test_whoever_follows_gets_what_is_sent_as_it_is_and_who_sends_it(relay: Relay) -> None:
    program, looks = relay.client(), Looking(relay.client())
    relay.run()
    program.greet()
    program.send(request(5))
    eventually(lambda: looks.ask().processes, "it has said hello")
    assert looks.ask(follow=True).processes[0].pid == program.pid
    number, first = looks.seen()
    assert first == hello(pid=program.pid)
    assert looks.seen() == (number, request(5))  # it was under way already
    program.send(step(2))
    sender, frame = looks.seen()
    assert (sender, frame.number) == (number, 2)


def test_the_spans_of_a_request_come_as_they_are_exported(relay: Relay) -> None:
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    program, looks = relay.client(), Looking(relay.client())
    relay.run()
    program.greet()
    looks.ask(follow=True)
    program.send(request(5))
    program.send(scheduled(1, requests=[5], tokens=[1], prefills=[True], first=[5], cached=[0], fetched=[0]))
    program.send(request_end(5, reason="abort"))
    made = eventually(lambda: isinstance(view := looks.next(), looking.Made) and view, "the request's spans")
    (resource,) = ExportTraceServiceRequest.FromString(made.request).resource_spans
    assert "queue" in [span.name for span in resource.scope_spans[0].spans]


def test_more_spans_than_a_packet_takes_come_in_several(relay: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    client, looks = relay.client(), Looking(relay.client())
    relay.run()
    looks.ask(follow=True)
    client.greet()
    client.send(step(1, stages=[stage(name=f"{index:03}" * 100) for index in range(400)]))
    assert client.flush()
    relay.server._viewers.made(relay.exporter.spans)
    names: list[str] = []
    while len(names) < 401:
        view = looks.next()
        if isinstance(view, looking.Made):
            (resource,) = ExportTraceServiceRequest.FromString(view.request).resource_spans
            names += [span.name for span in resource.scope_spans[0].spans]
    assert sorted(names) == sorted(span.name for span in relay.exporter.spans)


def test_whoever_reads_slowly_keeps_nobody_waiting_and_is_told_what_it_missed(
    relay: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(viewers, "MAX_BACKLOG_BYTES", 100_000)
    program, looks = relay.client(), Looking(relay.client())
    relay.run()
    program.greet()
    looks.ask(follow=True)
    for number in range(300):
        program.send(step(number, attributes={"text": "x" * 50_000}))
    assert program.flush()
    assert len(relay.exporter.spans) == 600
    session = looks.ask()
    unseen = session.unseen or looks.ask().unseen
    assert unseen > 0
    assert unseen + len(looks.views) >= 300


def test_whoever_looks_keeps_no_relay_alive() -> None:
    server = Server([], stay=False)
    pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(2)]
    for _, theirs in pairs:
        server.add_client(theirs)
    pairs[0][0].send(frames.encode(hello()))
    pairs[1][0].send(frames.encode(frames.Look(frames.PROTOCOL)))
    pairs[0][0].close()
    server.run()  # ends by itself
    pairs[1][0].close()


def test_one_of_another_version_is_told_so_and_gets_nothing(relay: Relay) -> None:
    program, looks = relay.client(), Looking(relay.client())
    relay.run()
    looks.ask(follow=True, protocol=99)
    program.greet()
    eventually(lambda: looks.ask().processes, "it has said hello")
    assert looks.views == []


def test_all_processes_are_switched_those_that_come_later_too(relay: Relay) -> None:
    programs, looks = [relay.client() for _ in range(3)], Looking(relay.client())
    relay.run()
    for program in programs[:2]:
        program.greet()
    looks.ask()
    looks.switch(on=False)
    for program in programs:
        assert frames.decode_switch(program.connection.recv(1024)).on is False
        program.send(hello(pid=program.pid, on=False))
        program.send(frames.Switched(False))
    eventually(lambda: [each.on for each in looks.ask().processes] == [False] * 3, "all have said that they are off")
    looks.switch(on=True)
    for program in programs:
        assert frames.decode_switch(program.connection.recv(1024)).on is True
    programs[0].send(hello(pid=9, on=False))  # as a process that begins anew would
    assert frames.decode_switch(programs[0].connection.recv(1024)).on is True


def test_a_traced_process_switches_nobody(relay: Relay) -> None:
    program, other = relay.client().greet(), relay.client().greet()
    relay.run()
    program.send(frames.Switch(False))
    program.send(frames.Look(frames.PROTOCOL))
    assert program.flush() is False  # two bad frames
    other.connection.setblocking(False)
    with pytest.raises(BlockingIOError):
        other.connection.recv(1024)


def test_one_who_looks_is_no_traced_process_too(relay: Relay) -> None:
    """It would be told of at its end by nobody: what it had sent would be held for ever."""
    connection = relay.client()
    looks = Looking(connection)
    relay.run()
    looks.ask()
    connection.greet().send(request(1))
    eventually(lambda: looks.ask().dropped.get(semconv.BAD_FRAME) == 2, "both are bad frames")
    assert looks.ask().processes == []


def test_requests_under_way_are_shown_as_far_as_they_are_known_once_capture_is_off(relay: Relay) -> None:
    program, looks = relay.client(), Looking(relay.client())
    relay.run()
    program.greet()
    looks.ask()
    program.send(request(5))
    program.send(scheduled(1, requests=[5], tokens=[1], prefills=[True], first=[5], cached=[0], fetched=[0]))
    looks.switch(on=False)
    eventually(lambda: [span.name for span in relay.exporter.spans if span.name == "queue"], "the request is shown")
    assert relay.exporter.dropped("request_unfinished") == 0


def test_what_is_under_way_may_still_come_for_a_second() -> None:
    now = [0.0]
    quiet: list[float] = []
    switching = Switching([], lambda: quiet.append(now[0]), lambda: now[0])  # type: ignore[arg-type]
    switching.want(on=False)
    now[0] = QUIET_SECONDS / 2
    switching.tick()
    assert not quiet
    assert switching.waiting
    switching.want(on=True)
    now[0] = 2 * QUIET_SECONDS
    switching.tick()
    assert not quiet
    switching.want(on=False)
    now[0] = 4 * QUIET_SECONDS
    switching.tick()
    switching.tick()
    assert quiet == [now[0]]
