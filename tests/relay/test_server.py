"""The relay's loop: bad frames cost only themselves, and flushes are answered rightly and apart from each other."""

from __future__ import annotations

import contextlib
import logging
import math
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from otel_npu import semconv
from otel_npu.relay import server as server_module
from otel_npu.relay.server import Server
from otel_npu.wire import frames
from tests.helpers.built import hello, request, request_end, scheduled, stage, step, unfinished, updated
from tests.helpers.traced import PATIENCE_SECONDS, eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from opentelemetry.sdk.trace import ReadableSpan


class Exporter(SpanExporter):
    """Keeps spans. `hold` keeps it inside `export`; it fails for the spans that `refuses` tells it.

    Attributes:
        takes_seconds: How long each export takes.
    """

    def __init__(self) -> None:
        self.spans: list[ReadableSpan] = []
        self.takes_seconds = 0.0
        self.holding = threading.Event()
        self.released = threading.Event()
        self.released.set()
        self.refuses: Callable[[ReadableSpan], bool] = lambda _: False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.holding.set()
        assert self.released.wait(PATIENCE_SECONDS)
        time.sleep(self.takes_seconds)
        if any(self.refuses(span) for span in spans):
            return SpanExportResult.FAILURE
        self.spans += spans
        return SpanExportResult.SUCCESS

    def hold(self) -> None:
        self.released.clear()
        self.holding.clear()

    def dropped(self, reason: str) -> Any:
        return sum((span.attributes or {}).get(semconv.DROPPED_PREFIX + reason, 0) for span in self.spans)

    def steps(self) -> list[Any]:
        return [(span.attributes or {})["npu.step.number"] for span in self.spans if span.name == "worker_step"]


class Client:
    """A traced process, as the relay sees it."""

    def __init__(self, connection: socket.socket, pid: int) -> None:
        self.connection = connection
        self.pid = pid
        connection.settimeout(PATIENCE_SECONDS)

    def send(self, frame: msgspec.Struct | bytes) -> None:
        self.connection.send(frame if isinstance(frame, bytes) else frames.encode(frame))

    def greet(self) -> Client:
        self.send(hello(pid=self.pid))
        return self

    def ask_to_flush(self, number: int = 1, timeout_seconds: float = PATIENCE_SECONDS) -> None:
        self.send(frames.Flush(number, timeout_seconds))

    def flushed(self) -> frames.Flushed:
        return frames.decode_flushed(self.connection.recv(1024))

    def flush(self, timeout_seconds: float = PATIENCE_SECONDS) -> bool:
        self.ask_to_flush(1, timeout_seconds)
        return self.flushed().complete


class Relay:
    """The server on a thread of this process."""

    def __init__(self) -> None:
        self.exporter = Exporter()
        self.server = Server([self.exporter], stay=True)
        self._thread: threading.Thread | None = None
        self._clients = contextlib.ExitStack()
        self._pids = iter(range(1, 100))

    def client(self) -> Client:
        """One more client; before the server runs."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._clients.enter_context(ours)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        self.server.add_client(theirs)
        return Client(ours, next(self._pids))

    def run(self) -> None:
        self._thread = threading.Thread(target=self.server.run)
        self._thread.start()

    def end(self) -> None:
        """Stop, and wait until all is exported."""
        self.exporter.released.set()
        self.server.stop()
        if self._thread is not None:
            self._thread.join(PATIENCE_SECONDS)
            assert not self._thread.is_alive()
        self._clients.close()


@pytest.fixture
def relay() -> Iterator[Relay]:
    running = Relay()
    yield running
    if running._thread is None:
        running.run()
    running.end()


@pytest.fixture
def client(relay: Relay) -> Client:
    only = relay.client()
    relay.run()
    return only


# Bad frames

GOOD = frames.encode(step(7))

BAD_FRAMES: dict[str, bytes | msgspec.Struct] = {
    "garbage": b"GET / HTTP/1.1\r\n\r\n",
    "nothing but zeros": bytes(100),
    "a truncated frame": GOOD[:-7],
    "a frame and then some": GOOD + b"\x01",
    "longer than frames may be": b"\x01" * (frames.MAX_FRAME_BYTES + 1),
    "an unknown frame": msgspec.msgpack.encode(["goodbye", 1]),
    "a frame of another shape": msgspec.msgpack.encode({"step": 1}),
    "too few fields": msgspec.msgpack.encode(["step", b"t" * 16]),
    "a text in a number's place": step(7, number="seven"),
    "a number in a text's place": step(7, kind=7),
    "text that is not UTF-8": frames.encode(step(7, kind="Brumm")).replace(b"Brumm", b"Br\xfcmm"),
    "an answer in a question's place": frames.Flushed(1, complete=True),
    "another protocol's hello": hello(protocol=99),
    "an impossible pid": hello(pid=-1),
    "a clock finer than nothing": hello(device_resolution_ns=-1),
    "a negative duration": step(7, stages=[stage(duration_ns=-1)]),
    "a duration of centuries": step(7, stages=[stage(duration_ns=1 << 63)]),
    "a negative time": step(7, opened_ns=-1),
    "a time beyond all clocks": step(7, stages=[stage(device_ns=1 << 63)]),
    "a negative count": step(7, dropped={"queue_full": -1}),
    "a short link": step(7, links=[b"l" * 24]),
    "a long link": step(7, links=[b"l" * 26]),
    "a short trace id": step(7, trace_id=b"t" * 15),
    "a trace id of zeros": step(7, trace_id=bytes(16)),
    "a step span without an id": step(7, span_id=b""),
    "a long span id": step(7, span_id=b"s" * 9),
    "a short parent id": step(7, parent_span_id=b"p" * 7),
    "an attribute that OTLP can't hold": step(7, attributes={"tokens": (1 << 64) - 1}),
    "such an attribute in a list": step(7, stages=[stage(attributes={"tokens": [1, (1 << 64) - 1]})]),
    "an attribute of bytes": step(7, attributes={"tokens": b"\xff"}),
    "an attribute of nothing": step(7, attributes={"tokens": None}),
    "a hang in half a trace": unfinished(trace_id=b"t"),
    "a hang in the future": unfinished(now_ns=1),
    "a ping from the future": frames.Ping(0, 5000, 2000, 1000),
    "a request without a parent": request(7, parent_span_id=b""),
    "a request without a key": request(7, key=bytes(8)),
    "a step that nobody can name": scheduled(7, span_id=b""),
    "more requests than tokens": scheduled(7, requests=[1], tokens=[], prefills=[]),
    "more tokens than there are": scheduled(7, requests=[1], tokens=[2], prefills=[True]),
    "an output without its tokens": updated(7, requests=[1]),
    "an end of nothing": request_end(7, key=b""),
    "a flush in the past": frames.Flush(1, -1.0),
    "a flush that is not a number": frames.Flush(1, math.nan),
    "a flush without end": frames.Flush(1, math.inf),
}


@pytest.mark.parametrize("bad", BAD_FRAMES.values(), ids=BAD_FRAMES)
def test_a_bad_frame_costs_itself_and_one_line(
    relay: Relay, client: Client, caplog: pytest.LogCaptureFixture, bad: bytes | msgspec.Struct
) -> None:
    client.greet()
    client.send(step(1))
    client.send(bad)
    client.send(step(2))
    assert not client.flush()  # something of it was lost
    assert client.flush()

    assert relay.exporter.steps() == [1, 2]
    assert relay.exporter.dropped(semconv.BAD_FRAME) == 1
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert "can't be read and is left out: " in record.getMessage()
    assert "\n" not in record.getMessage()
    assert record.exc_info is None


@pytest.mark.parametrize(
    "silent",
    [
        step(1, trace_id=b"", span_id=b"", dropped={"pool_exhausted": 3}),
        step(1, bare=True, dropped={"pool_exhausted": 3}),
        scheduled(1, trace_id=b"", dropped={"pool_exhausted": 3}),
    ],
    ids=["a step that is not kept", "a step that is one stage", "an engine's step that is not kept"],
)
def test_what_a_process_that_leaves_no_step_span_would_have_said_another_says(
    relay: Relay, silent: msgspec.Struct
) -> None:
    """It takes along neither its own counts nor those of the relay, which came before it was read."""
    going, staying = relay.client(), relay.client()
    relay.run()
    for frame in (b"rubbish", hello(pid=going.pid), silent, b"rubbish"):
        going.send(frame)
    going.flush()
    going.connection.close()
    eventually(lambda: len(relay.server._clients) == 1, "it has gone")
    staying.greet().send(step(2))
    staying.flush()
    assert relay.exporter.dropped(semconv.BAD_FRAME) == 2
    assert relay.exporter.dropped(semconv.POOL_EXHAUSTED) == 3


def test_engines_are_read_before_those_of_whom_less_is_held_but_not_once_much_is(
    relay: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever has sent first: else each step of a worker would be one that no engine has told of, for a moment."""
    worker, engine = relay.client().greet(), relay.client().greet()
    engine.send(request(1))
    read: list[int] = []

    def look() -> list[int]:
        read.clear()
        for client in (worker, engine):
            client.send(frames.Ping(0, 1, 1, 1))
        relay.server._read(list(relay.server._clients))
        return list(dict.fromkeys(read))

    look()
    take = relay.server._take_packet

    def taken(client: Any, packet: memoryview) -> int:
        read.append(client.assembler.hello.pid)
        return take(client, packet)

    monkeypatch.setattr(relay.server, "_take_packet", taken)
    assert look() == [engine.pid, worker.pid]
    monkeypatch.setattr(server_module, "CROWDED_BYTES", 1)
    assert look() == [worker.pid]
    assert look() == [worker.pid]  # what the engine has sent waits


def test_the_line_says_what_is_wrong(relay: Relay, client: Client, caplog: pytest.LogCaptureFixture) -> None:
    client.greet()
    for bad in (
        BAD_FRAMES["another protocol's hello"],
        BAD_FRAMES["a short link"],
        BAD_FRAMES["a text in a number's place"],
    ):
        client.send(bad)
    assert not client.flush()
    lines = [record.getMessage().split("left out: ")[1] for record in caplog.records]
    assert lines[0] == f"protocol 99, this relay has {frames.PROTOCOL}"
    assert lines[1] == "a link of 24 bytes, not 25"
    assert "Expected `int`, got `str`" in lines[2]


def test_a_client_of_another_protocol_is_one_line_however_much_it_sends(
    relay: Relay, client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    client.send(hello(protocol=99))
    for number in range(100):
        client.send(step(number))
    assert not client.flush()
    assert relay.exporter.steps() == []
    assert len(caplog.records) == 2  # the hello, and that the rest comes without one


def test_a_frame_before_the_hello_is_left_out(relay: Relay, client: Client, caplog: pytest.LogCaptureFixture) -> None:
    client.send(step(1))
    client.greet()
    client.send(step(2))
    assert not client.flush()
    assert relay.exporter.steps() == [2]
    assert "a frame before the hello" in caplog.text


def test_the_bad_frames_of_one_client_cost_another_nothing(relay: Relay) -> None:
    good, bad = relay.client().greet(), relay.client().greet()
    for number in range(200):
        good.send(step(number))
        bad.send(b"garbage")
    relay.run()
    assert good.flush()
    assert relay.exporter.steps() == list(range(200))


# Clients come and go


def test_what_is_in_the_socket_of_a_client_that_has_gone_is_exported(relay: Relay) -> None:
    client = relay.client().greet()
    for number in range(500):
        client.send(step(number))
    client.connection.close()
    relay.run()
    relay.end()
    assert relay.exporter.steps() == list(range(500))


def test_what_is_held_of_a_worker_is_waited_for_from_its_engine(relay: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
    """A packet of many steps is many; and who is ahead by much is read after the others."""
    monkeypatch.setattr(server_module, "FRAMES_PER_TURN", 8)
    monkeypatch.setattr(server_module, "CROWDED_BYTES", 20_000)
    engine, worker = relay.client().greet(), relay.client().greet()
    numbers = range(1, 65)
    for first in numbers[::8]:
        several = [
            step(number, rank=0, parent_span_id=number.to_bytes(8, "big")) for number in numbers[first - 1 : first + 7]
        ]
        worker.send(frames.Several([msgspec.Raw(frames.encode(each)) for each in several]))
    for number in numbers:
        engine.send(scheduled(number))
        engine.send(updated(number))
    held = []
    forward = relay.server._ledger.hold

    def hold(account: Any, frame: Any, packet_bytes: int) -> None:
        forward(account, frame, packet_bytes)
        held.append(account.held_bytes if isinstance(frame, frames.Step) else 0)

    monkeypatch.setattr(relay.server._ledger, "hold", hold)
    relay.run()
    assert engine.flush()
    assert len(relay.exporter.steps()) == len(numbers)
    assert max(held) < 2 * 20_000


def test_stopping_reads_what_is_there_and_takes_no_more(relay: Relay) -> None:
    client = relay.client().greet()
    for number in range(500):
        client.send(step(number))
    relay.server.stop()
    relay.run()
    relay.end()
    assert relay.exporter.steps() == list(range(500))


LOOKS = round(server_module.DRAIN_SECONDS / server_module.DRAIN_LOOK_SECONDS)
"""So many, in which nothing gets through, are enough."""


@pytest.mark.parametrize(
    ("left", "exported"),
    [
        pytest.param([], True, id="nothing waits"),
        pytest.param([*[2] * LOOKS, *[1] * LOOKS], True, id="something gets through in time, again and again"),
        pytest.param([2] * (LOOKS + 1), False, id="nothing gets through"),
        pytest.param([1, *[2] * LOOKS], False, id="what is on its way comes back"),
        pytest.param([*range(10_000, 0, -1)], False, id="it would take for ever"),
    ],
)
def test_in_the_end_a_receiver_is_waited_for_as_long_as_something_gets_through(
    left: list[int], *, exported: bool
) -> None:
    """Counted in looks: a relay that gets little of the processor takes fewer of them a second."""
    looks = iter([*left, 0])

    class Export:
        def wait(self, timeout_seconds: float) -> int:
            assert timeout_seconds == server_module.DRAIN_LOOK_SECONDS
            return next(looks)

    assert server_module.all_exported(Export(), lambda: None) is exported


@pytest.mark.slow
def test_a_slow_receiver_gets_all_that_was_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though that takes longer than one that takes nothing would be waited for."""
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "50")
    monkeypatch.setattr(server_module, "DRAIN_SECONDS", 1.5)
    relay = Relay()
    relay.exporter.takes_seconds = 0.3
    client = relay.client().greet()
    for number in range(500):
        client.send(step(number))
    relay.server.stop()
    relay.run()
    relay.end()
    assert relay.exporter.steps() == list(range(500))


def test_a_client_that_says_hello_again_keeps_its_count_of_drops(relay: Relay, client: Client) -> None:
    client.greet()
    client.send(step(1, trace_id=b"", span_id=b"", dropped={"pool_exhausted": 3}))  # no trace: nothing shows it
    client.greet()
    client.send(step(2, dropped={"pool_exhausted": 1}))
    assert client.flush()
    [span] = [span for span in relay.exporter.spans if span.name == "worker_step"]
    assert (span.attributes or {})["npu.dropped.pool_exhausted"] == 4


def test_a_stage_that_hangs_is_a_span_at_once(relay: Relay, client: Client) -> None:
    client.greet()
    client.send(unfinished())
    assert client.flush()
    [span] = relay.exporter.spans
    assert span.name == semconv.UNFINISHED_STAGE
    assert (span.attributes or {})[semconv.UNFINISHED_FOR] == pytest.approx(30.0)


# Engines, their workers and a front end


def serve_a_request(engine: Client, worker: Client, front_end: Client) -> None:
    engine.send(request(1))
    engine.send(scheduled(1, requests=[1], tokens=[1], prefills=[True]))
    engine.send(updated(1, requests=[1], new_tokens=[1], finished=[1]))
    worker.send(step(1, parent_span_id=(1).to_bytes(8, "big"), rank=0, returns_output=True))
    front_end.send(request_end(1))


def test_what_processes_say_of_a_request_is_joined(relay: Relay) -> None:
    engine, worker, front_end = (relay.client().greet() for _ in range(3))
    serve_a_request(engine, worker, front_end)
    relay.run()
    assert engine.flush()
    names = {span.name: span for span in relay.exporter.spans}
    assert set(names) == {"worker_step", "forward", "engine_step", "queue", "prefill"}
    assert names["prefill"].resource.attributes["process.pid"] == engine.pid
    assert names["worker_step"].resource.attributes["process.pid"] == worker.pid


def test_a_flush_reads_what_other_processes_had_sent_before_it(relay: Relay) -> None:
    engine, worker, front_end = (relay.client().greet() for _ in range(3))
    serve_a_request(engine, worker, front_end)
    engine.ask_to_flush()
    relay.run()  # from here on: the engine is the first that it reads
    assert engine.flushed().complete
    [prefill] = [span for span in relay.exporter.spans if span.name == "prefill"]
    assert (prefill.attributes or {})["npu.request.finish_reason"] == "stop"


def test_what_waits_is_sent_although_nothing_more_comes(relay: Relay) -> None:
    engine = relay.client().greet()
    relay.run()
    engine.send(request(1))
    engine.send(scheduled(1, ranks=2, requests=[1], tokens=[1], prefills=[True]))
    engine.send(updated(1, requests=[1], new_tokens=[1], finished=[1]))
    assert eventually(lambda: {"engine_step", "queue"} <= {span.name for span in relay.exporter.spans}, "both are sent")


def test_stopping_sends_the_spans_of_what_is_over(relay: Relay) -> None:
    engine = relay.client().greet()
    engine.send(request(1))
    engine.send(scheduled(1, ranks=2, requests=[1], tokens=[1], prefills=[True]))
    engine.send(updated(1, requests=[1], new_tokens=[1], finished=[1]))
    relay.server.stop()
    relay.run()
    relay.end()
    assert {span.name for span in relay.exporter.spans} == {"engine_step", "queue"}


def test_an_engine_that_goes_away_takes_its_unfinished_requests_along(
    relay: Relay, caplog: pytest.LogCaptureFixture
) -> None:
    engine = relay.client().greet()
    engine.send(request(1))
    engine.connection.close()
    relay.run()
    relay.end()
    assert relay.exporter.spans == []
    assert "1 request_unfinished" in caplog.text


# Flushes


def test_a_flush_is_answered_when_all_before_it_is_exported(relay: Relay, client: Client) -> None:
    client.greet()
    for number in range(100):
        client.send(step(number))
    client.ask_to_flush(42)
    assert client.flushed() == frames.Flushed(42, complete=True)
    assert relay.exporter.steps() == list(range(100))


def test_a_flush_with_nothing_before_it_is_complete(client: Client) -> None:
    assert client.greet().flush()


def test_a_flush_whose_spans_the_receiver_refuses_is_not_complete(relay: Relay, client: Client) -> None:
    client.greet()
    relay.exporter.refuses = lambda _: True
    client.send(step(1))
    assert not client.flush()
    relay.exporter.refuses = lambda _: False
    client.send(step(2))
    assert client.flush()  # each answers for what came since the one before
    assert relay.exporter.steps() == [2]


def test_a_flush_that_takes_too_long_is_not_complete(relay: Relay, client: Client) -> None:
    client.greet()
    relay.exporter.hold()
    client.send(step(1))
    assert not client.flush(timeout_seconds=0.05)
    relay.exporter.released.set()
    assert client.flush()


def test_a_flush_answers_for_its_own_client_only(relay: Relay) -> None:
    lucky, unlucky = relay.client().greet(), relay.client().greet()
    relay.exporter.refuses = lambda span: span.resource.attributes["process.pid"] == unlucky.pid
    relay.run()
    for _ in range(3):
        unlucky.send(step(1))
        assert not unlucky.flush()
        lucky.send(step(2))
        assert lucky.flush()
    assert relay.exporter.steps() == [2, 2, 2]


def test_the_flush_of_one_does_not_use_up_the_loss_of_another(relay: Relay) -> None:
    first, second = relay.client().greet(), relay.client().greet()
    relay.exporter.refuses = lambda _: True
    first.send(step(1))
    second.send(step(1))
    relay.run()
    assert not first.flush()
    assert not second.flush()


def test_while_one_waits_for_its_flush_another_is_served(relay: Relay) -> None:
    patient, hasty = relay.client().greet(), relay.client().greet()
    relay.exporter.hold()
    relay.run()
    patient.send(step(1))
    patient.ask_to_flush()
    assert relay.exporter.holding.wait(PATIENCE_SECONDS)
    # The export is stuck with the first one's span; the second is still read, and answered when its time is up.
    for number in range(100):
        hasty.send(step(number))
    assert not hasty.flush(timeout_seconds=0.05)
    relay.exporter.released.set()
    assert patient.flushed().complete
    assert hasty.flush()


def test_who_waits_for_a_flush_and_leaves_disturbs_nobody(relay: Relay) -> None:
    leaving, staying = relay.client().greet(), relay.client().greet()
    relay.exporter.hold()
    relay.run()
    leaving.send(step(1))
    leaving.ask_to_flush()
    assert relay.exporter.holding.wait(PATIENCE_SECONDS)
    leaving.connection.close()
    relay.exporter.released.set()
    staying.send(step(2))
    assert staying.flush()
    assert sorted(relay.exporter.steps()) == [1, 2]
