"""Spans leave through the standard exporters, behind a queue that is bounded and counts what it loses."""

from __future__ import annotations

import json
import logging
import random
import select
import socket
import threading
from typing import TYPE_CHECKING, Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SpanExporter, SpanExportResult
from opentelemetry.trace import SpanContext

from otel_npu.drops import Drops
from otel_npu.relay.account import Account
from otel_npu.relay.destination import Destination
from otel_npu.relay.export import ExportQueue
from otel_npu.relay.exporters import exporters_from_environment
from otel_npu.relay.otlp import GrpcExporter, HttpExporter, OtlpExporter
from otel_npu.relay.otlp_settings import ExportError, OtlpSettings
from otel_npu.relay.outcomes import Later, Never, Outcome, Taken, TooLarge
from tests.helpers.traced import PATIENCE_SECONDS, Programs, eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from tests.helpers.receiver import Receiver


@pytest.fixture
def programs(tmp_path: Path) -> Iterator[Programs]:
    with Programs(tmp_path) as running:
        yield running


class Exporter(SpanExporter):
    """Keeps batches of names. It waits while held, and does what it is told instead of succeeding."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.entered = threading.Event()
        self.released = threading.Event()
        self.released.set()
        self.instead: Callable[[], SpanExportResult] = lambda: SpanExportResult.SUCCESS
        self.is_shut_down = threading.Event()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.entered.set()
        assert self.released.wait(PATIENCE_SECONDS)
        self.batches.append([span.name for span in spans])
        return self.instead()

    def shutdown(self) -> None:
        self.is_shut_down.set()

    @property
    def names(self) -> list[str]:
        return [name for batch in self.batches for name in batch]


class Sender(OtlpExporter):
    """Keeps the requests that are sent. It waits while held, and says what it is told."""

    def __init__(self, timeout_seconds: float = PATIENCE_SECONDS) -> None:
        super().__init__(OtlpSettings("grpc", "collector:4317", secure=False, timeout_seconds=timeout_seconds))
        self.requests: list[list[str]] = []
        self.sizes: list[int] = []
        self.entered = threading.Semaphore(0)
        self.released = threading.Event()
        self.released.set()
        self.says: Callable[[list[str]], Outcome] = lambda _: Taken()

    def send(self, body: bytes, timeout_seconds: float) -> Outcome:
        self.entered.release()
        assert self.released.wait(PATIENCE_SECONDS)
        request = ExportTraceServiceRequest.FromString(body)
        parts = (scope.spans for resource in request.resource_spans for scope in resource.scope_spans)
        names = [span.name for spans in parts for span in spans]
        outcome = self.says(names)
        if isinstance(outcome, Taken):
            self.requests.append(names)
            self.sizes.append(len(body))
        return outcome

    def shutdown(self) -> None:
        pass

    @property
    def names(self) -> list[str]:
        return [name for request in self.requests for name in request]


CONTEXT = SpanContext(1, 2, is_remote=False)


def spans(*names: str, **attributes: Any) -> list[ReadableSpan]:
    return [ReadableSpan(name, CONTEXT, attributes=attributes, start_time=1, end_time=2) for name in names]


def numbered(numbers: range) -> list[ReadableSpan]:
    return spans(*map(str, numbers))


class Bench:
    """A queue, its exporters and its one client."""

    def __init__(self, *exporters: SpanExporter, **environment: str) -> None:
        self.drops = Drops()
        self.account = Account()
        # Nothing leaves by the clock: only full batches and what is flushed.
        self.queue = ExportQueue(exporters, self.drops, {"OTEL_BSP_SCHEDULE_DELAY": "3600000", **environment})

    def put(self, *batch: ReadableSpan) -> None:
        self.queue.put(batch, self.account)

    def put_one_by_one(self, numbers: range) -> None:
        for span in numbered(numbers):
            self.put(span)

    def flush(self, timeout_seconds: float = PATIENCE_SECONDS) -> bool:
        return self.queue.flush(self.account, self.account.accepted, timeout_seconds)


@pytest.fixture
def sender() -> Iterator[Sender]:
    only = Sender()
    yield only
    only.released.set()


@pytest.fixture
def exporter() -> Iterator[Exporter]:
    only = Exporter()
    yield only
    only.released.set()


# Batches


def test_a_flush_exports_all_in_order(sender: Sender) -> None:
    bench = Bench(sender)
    bench.put(*numbered(range(100)))
    bench.put(*numbered(range(100, 150)))
    assert bench.flush()
    assert sender.names == [str(number) for number in range(150)]
    assert bench.drops.take_line() == ""


def test_other_exporters_get_spans_as_they_are(exporter: Exporter) -> None:
    bench = Bench(exporter)
    bench.put(*numbered(range(150)))
    assert bench.flush()
    assert exporter.names == [str(number) for number in range(150)]


def test_a_full_batch_leaves_by_itself(sender: Sender) -> None:
    bench = Bench(sender, OTEL_BSP_MAX_EXPORT_BATCH_SIZE="10")
    bench.put_one_by_one(range(25))
    eventually(lambda: len(sender.requests) == 2, "two batches are full")
    assert [len(batch) for batch in sender.requests] == [10, 10]
    assert bench.flush()
    assert [len(batch) for batch in sender.requests] == [10, 10, 5]


def test_what_is_put_together_leaves_together(sender: Sender) -> None:
    """A request's trace that comes in two parts is cut in two by its store."""
    bench = Bench(sender, OTEL_BSP_MAX_EXPORT_BATCH_SIZE="10")
    for _ in range(20):
        bench.put(*numbered(range(7)))
    bench.put(*numbered(range(25)))
    assert bench.flush()
    assert [len(batch) for batch in sender.requests] == [7] * 20 + [25]


def test_a_batch_is_bounded_by_its_bytes_too(sender: Sender) -> None:
    """A receiver takes 4 MB at once, unless it is told otherwise."""
    bench = Bench(sender)
    for number in range(512):
        bench.put(*spans(str(number), text="x" * 20_000))
    assert bench.flush()
    assert sum(sender.sizes) > 10_000_000
    assert max(sender.sizes) < 1_100_000
    assert sender.names == [str(number) for number in range(512)]


def test_a_receiver_that_takes_less_at_once_gets_less_from_then_on(sender: Sender) -> None:
    sent: list[int] = []

    def takes_ten(names: list[str]) -> Outcome:
        sent.append(len(names))
        return TooLarge("413") if len(names) > 10 else Taken()

    sender.says = takes_ten
    bench = Bench(sender)
    for number in range(400):
        bench.put(*spans(str(number), text="x" * 20_000))
    assert bench.flush()
    assert sorted(map(int, sender.names)) == list(range(400))
    assert bench.drops.take_line() == ""
    assert sent[-10:] == [size for size in sent[-10:] if size <= 20]  # at first 50 at once


def test_what_is_queued_leaves_after_the_delay(sender: Sender) -> None:
    bench = Bench(sender, OTEL_BSP_SCHEDULE_DELAY="1")
    bench.put(*spans("late"))
    assert sender.entered.acquire(timeout=PATIENCE_SECONDS)


def test_without_an_exporter_nothing_is_kept() -> None:
    bench = Bench()
    bench.put(*numbered(range(1000)))
    assert bench.account.accepted == 0
    assert bench.flush(0)


def test_while_no_thread_can_be_started_spans_wait(sender: Sender, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_threads(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    first, second = spans("first", "second")
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", no_threads)
        bench = Bench(sender)
        bench.put(first)
        assert not bench.flush(0)
    bench.put(second)
    assert bench.flush()
    assert sender.names == ["first", "second"]
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", no_threads)
        bench.queue.close(0.1)  # the exporter's own end is left out


def test_a_fault_of_our_own_ends_nothing(
    sender: Sender, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(_: Destination) -> None:
        raise ZeroDivisionError

    bench = Bench(sender)
    with monkeypatch.context() as patched:
        patched.setattr(Destination, "tick", failing)
        bench.put(*spans("forward"))
        eventually(lambda: "a fault of otel-npu's own" in caplog.text, "the fault is told of")
    assert bench.flush()
    assert sender.names == ["forward"]
    assert bench.drops.take_unsent()["internal_error"] >= 1


def test_one_span_that_can_not_be_encoded_costs_itself_and_is_counted(sender: Sender) -> None:
    bench = Bench(sender)
    [bad] = spans("beyond all clocks")
    bad._end_time = 1 << 64
    bench.put(*numbered(range(3)), bad, *numbered(range(3, 6)))
    assert not bench.flush()
    assert sender.names == [str(number) for number in range(6)]
    assert bench.drops.take_unsent() == {"not_encodable": 1}
    assert bench.flush()


def test_the_counts_on_a_step_span_that_can_not_be_encoded_go_with_a_later_one(sender: Sender) -> None:
    bench = Bench(sender)
    [bad] = spans("worker_step", **{"npu.dropped.queue_full": 5})
    bad._end_time = 1 << 64
    bench.put(bad)
    assert bench.drops.take_unsent() == {"not_encodable": 1, "queue_full": 5}


# Losses


def test_beyond_its_bound_the_queue_drops_the_oldest_and_counts_them(exporter: Exporter) -> None:
    bench = Bench(exporter, OTEL_BSP_MAX_QUEUE_SIZE="100", OTEL_BSP_MAX_EXPORT_BATCH_SIZE="1")
    exporter.released.clear()
    bench.put(*spans("in flight"))
    assert exporter.entered.wait(PATIENCE_SECONDS)
    bench.put_one_by_one(range(250))
    exporter.released.set()
    assert not bench.flush()
    assert exporter.names == ["in flight", *(str(number) for number in range(150, 250))]
    assert bench.drops.take_unsent() == {"queue_full": 150}
    assert bench.flush()


@pytest.mark.slow
def test_while_the_receiver_is_away_spans_wait_in_few_bytes_and_then_all_leave(sender: Sender) -> None:
    """A million bytes hold what is 250 bytes a span on the wire for ten thousand spans: 64 MB do for ten minutes."""
    bench = Bench(sender, OTEL_NPU_QUEUE_BYTES="1000000")
    away = threading.Event()
    sender.says = lambda _: Taken() if away.is_set() else Later("UNAVAILABLE: nobody there")
    ids = random.Random(0)
    for number in range(2000):
        step = [
            ReadableSpan(
                f"stage{index}",
                SpanContext(ids.getrandbits(127) + 1, ids.getrandbits(63) + 1, is_remote=False),
                attributes={"npu.timing": "device", "npu.step.number": number, "npu.host.duration": ids.random()},
                start_time=1_700_000_000_000_000_000 + ids.getrandbits(40),
                end_time=1_700_000_001_000_000_000 + ids.getrandbits(40),
            )
            for index in range(5)
        ]
        bench.put(*step)
    assert not bench.flush(0.1)
    away.set()
    assert bench.flush()
    assert len(sender.names) == 10_000
    assert bench.drops.take_line() == ""


def failing() -> SpanExportResult:
    return SpanExportResult.FAILURE


def raising() -> SpanExportResult:
    raise RuntimeError("no such collector")


@pytest.mark.parametrize("instead", [failing, raising])
def test_spans_that_can_not_be_exported_are_counted_and_the_next_are_tried(
    exporter: Exporter, instead: Callable[[], SpanExportResult]
) -> None:
    bench = Bench(exporter)
    exporter.instead = instead
    bench.put(*numbered(range(7)))
    assert not bench.flush()
    assert bench.drops.take_unsent() == {"export_failed": 7}
    exporter.instead = lambda: SpanExportResult.SUCCESS
    bench.put(*spans("next"))
    assert bench.flush()
    assert exporter.names[-1] == "next"


def test_an_exporter_that_raises_is_one_line(exporter: Exporter, caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench(exporter)
    exporter.instead = raising
    bench.put(*spans("lost"))
    bench.flush()
    [record] = caplog.records
    assert record.getMessage() == "Exporter refuses spans: RuntimeError: no such collector; 1 of them are lost"


def test_one_exporter_that_fails_does_not_keep_spans_from_the_other(exporter: Exporter, sender: Sender) -> None:
    bench = Bench(exporter, sender)
    exporter.instead = raising
    bench.put(*spans("forward"))
    assert not bench.flush()
    assert sender.names == ["forward"]
    assert bench.drops.take_unsent() == {"export_failed": 1}


def test_what_all_exporters_lose_is_counted_once(exporter: Exporter, sender: Sender) -> None:
    bench = Bench(exporter, sender)
    exporter.instead = failing
    sender.says = lambda _: Taken(rejected=2)
    bench.put(*numbered(range(5)))
    assert not bench.flush()
    assert bench.drops.take_unsent() == {"export_failed": 5}


def test_a_flush_of_which_some_spans_are_rejected_is_not_complete(sender: Sender) -> None:
    bench = Bench(sender)
    sender.says = lambda _: Taken(rejected=2, message="quota exceeded")
    bench.put(*numbered(range(5)))
    assert not bench.flush()
    assert bench.drops.take_unsent() == {"export_rejected": 2}
    sender.says = lambda _: Taken()
    bench.put(*spans("later"))
    assert bench.flush()


def test_one_exporter_does_not_wait_for_the_other(exporter: Exporter, sender: Sender) -> None:
    bench = Bench(exporter, sender)
    exporter.released.clear()
    bench.put(*spans("first"))
    assert not bench.flush(0)
    bench.put(*spans("second"))
    assert not bench.flush(0)
    eventually(lambda: sender.names == ["first", "second"], "the other one has both")
    exporter.released.set()
    assert bench.flush()
    assert exporter.names == ["first", "second"]


@pytest.mark.parametrize("name", ["worker_step", "worker_step rank 1", "engine_step"])
def test_the_counts_on_a_step_span_that_is_lost_go_with_a_later_one(sender: Sender, name: str) -> None:
    """Else what was dropped while the receiver was down would never be known: its count was dropped with it."""
    bench = Bench(sender)
    sender.says = lambda _: Never("401")
    bench.put(*spans(name, **{"npu.dropped.pool_exhausted": 3, "npu.dropped.queue_full": 5}))
    bench.flush()
    assert bench.drops.take_unsent() == {"export_refused": 1, "pool_exhausted": 3, "queue_full": 5}
    assert bench.drops.take_line() == "1 export_refused"  # the log has had the others


def test_so_do_those_on_one_that_the_queue_drops(exporter: Exporter) -> None:
    bench = Bench(exporter, OTEL_BSP_MAX_QUEUE_SIZE="1")
    exporter.released.clear()
    bench.put(*spans("in flight"))
    assert exporter.entered.wait(PATIENCE_SECONDS)
    bench.put(*spans("worker_step", **{"npu.dropped.bad_link": 2}))
    bench.put(*spans("worker_step"))
    assert bench.drops.take_unsent() == {"queue_full": 1, "bad_link": 2}


# Slow receivers


def test_a_slow_receiver_is_sent_several_batches_at_once(sender: Sender) -> None:
    bench = Bench(sender, OTEL_BSP_MAX_EXPORT_BATCH_SIZE="1")
    sender.released.clear()
    bench.put_one_by_one(range(10))
    for _ in range(4):
        assert sender.entered.acquire(timeout=PATIENCE_SECONDS)
    assert not sender.entered.acquire(timeout=0.5)
    sender.released.set()
    assert bench.flush()
    assert sorted(map(int, sender.names)) == list(range(10))


def test_an_export_that_hangs_is_left_at_its_timeout_and_tried_again() -> None:
    sender = Sender(timeout_seconds=0.1)
    sender.released.clear()
    bench = Bench(sender)
    bench.put(*spans("forward"))
    assert not bench.flush(0)
    for _ in range(2):
        assert sender.entered.acquire(timeout=PATIENCE_SECONDS)
    sender.released.set()
    assert bench.flush()
    assert "forward" in sender.names


def test_an_answer_that_drips_is_left_at_its_timeout_too() -> None:
    """Each byte comes in time for the socket, so that alone the export would be held for as long as they come."""
    over = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            slow, _ = server.accept()
            with slow:
                while not over.wait(0.05):
                    slow.sendall(b"H")
                    if len(select.select([server], [], [], 0)[0]):
                        break
                quick, _ = server.accept()
                with quick:
                    quick.recv(1 << 16)
                    quick.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
                    over.wait(PATIENCE_SECONDS)

        thread = threading.Thread(target=answer)
        thread.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/v1/traces"
        settings = OtlpSettings("http/protobuf", url, secure=False, timeout_seconds=0.3)
        bench = Bench(HttpExporter(settings))
        bench.put(*spans("forward"))
        assert bench.flush()
        over.set()
        thread.join(PATIENCE_SECONDS)


def test_a_flush_out_of_time_says_so(sender: Sender) -> None:
    bench = Bench(sender)
    sender.released.clear()
    bench.put(*spans("slow"))
    assert not bench.flush(timeout_seconds=0.01)
    sender.released.set()
    assert bench.flush()


def test_a_flush_waits_for_what_is_tried_again_though_later_spans_have_arrived(sender: Sender) -> None:
    bench = Bench(sender, OTEL_BSP_MAX_EXPORT_BATCH_SIZE="1")
    sender.says = lambda names: Later("503") if names == ["0"] else Taken()
    bench.put_one_by_one(range(5))
    accepted = bench.account.accepted
    bench.put_one_by_one(range(5, 20))
    eventually(lambda: len(sender.names) == 19, "all but the first are taken")
    assert bench.queue.outcome(bench.account, accepted) is None
    assert not bench.queue.flush(bench.account, accepted, 0.01)
    sender.says = lambda _: Taken()
    assert eventually(lambda: bench.queue.outcome(bench.account, accepted), "the first is taken")


def test_who_asks_again_and_again_whether_all_is_exported_does_not_cut_the_batches_of_others(sender: Sender) -> None:
    bench, other = Bench(sender), Account()
    sender.released.clear()
    bench.put(*spans("asked for"))
    assert bench.queue.outcome(bench.account, bench.account.accepted) is None
    for number in range(50):
        bench.queue.put(spans(str(number)), other)
        assert bench.queue.outcome(bench.account, bench.account.accepted) is None
    sender.released.set()
    assert bench.flush()
    assert bench.queue.flush(other, other.accepted, PATIENCE_SECONDS)
    assert [len(request) for request in sender.requests] == [1, 50]


# The end


def test_closing_exports_the_rest_and_shuts_the_exporters_down() -> None:
    exporters = [Exporter(), Exporter()]
    bench = Bench(*exporters)
    bench.put(*spans("last"))
    bench.queue.close(PATIENCE_SECONDS)
    for exporter in exporters:
        assert exporter.names == ["last"]
        assert exporter.is_shut_down.wait(PATIENCE_SECONDS)


def test_closing_waits_no_longer_than_it_may_and_counts_what_is_left(exporter: Exporter) -> None:
    bench = Bench(exporter, OTEL_BSP_MAX_EXPORT_BATCH_SIZE="2")
    exporter.released.clear()
    bench.put_one_by_one(range(5))
    assert exporter.entered.wait(PATIENCE_SECONDS)
    bench.queue.close(0.01)
    assert bench.drops.take_line() == "5 export_failed"


# Settings


@pytest.mark.parametrize(
    "variable",
    [
        *("OTEL_BSP_SCHEDULE_DELAY", "OTEL_BSP_MAX_QUEUE_SIZE", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE"),
        "OTEL_NPU_QUEUE_BYTES",
    ],
)
@pytest.mark.parametrize("value", ["many", "0", "-5", "1.5"])
def test_a_bad_number_is_one_clear_line_and_the_default(
    caplog: pytest.LogCaptureFixture, variable: str, value: str
) -> None:
    good, bad = (ExportQueue([Exporter()], Drops(), environment) for environment in ({}, {variable: value}))
    [record] = caplog.records
    assert record.levelno == logging.ERROR
    assert f"{variable}={value!r}: takes a whole number " in record.getMessage()
    for queue in (good, bad):
        queue.close(0)
    assert (bad._delay, bad._max_batch) == (good._delay, good._max_batch)
    assert bad._destinations[0]._bounds == good._destinations[0]._bounds


# Which exporters


def kinds(**environment: str) -> list[type[SpanExporter]]:
    exporters = exporters_from_environment(environment)
    for exporter in exporters:
        exporter.shutdown()
    return [type(exporter) for exporter in exporters]


def test_unless_told_otherwise_spans_leave_over_otlp_and_grpc() -> None:
    assert kinds() == kinds(OTEL_TRACES_EXPORTER=" ") == kinds(OTEL_TRACES_EXPORTER="otlp") == [GrpcExporter]


def test_the_protocol_for_traces_wins_over_the_general_one() -> None:
    general, own = "OTEL_EXPORTER_OTLP_PROTOCOL", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"
    assert kinds(**{general: "http/protobuf"}) == [HttpExporter]
    assert kinds(**{general: "grpc"}) == [GrpcExporter]
    assert kinds(**{general: "grpc", own: "http/protobuf"}) == [HttpExporter]
    assert kinds(**{general: "http/protobuf", own: "grpc"}) == [GrpcExporter]
    assert kinds(**{general: "nonsense", own: "http/protobuf"}) == [HttpExporter]


def test_exporters_are_named_by_their_entry_points() -> None:
    assert kinds(OTEL_TRACES_EXPORTER="console") == [ConsoleSpanExporter]
    assert kinds(OTEL_TRACES_EXPORTER="none") == []
    assert kinds(OTEL_TRACES_EXPORTER="otlp_proto_http, console") == [HttpExporter, ConsoleSpanExporter]


def test_an_unknown_exporter_is_an_error_that_says_what_there_is() -> None:
    with pytest.raises(ExportError, match=r"OTEL_TRACES_EXPORTER='otlp,zipkin': takes .*console.*none.*otlp") as error:
        exporters_from_environment({"OTEL_TRACES_EXPORTER": "otlp,zipkin"})
    assert str(error.value).endswith("not 'zipkin'")


@pytest.mark.parametrize("variable", ["OTEL_EXPORTER_OTLP_PROTOCOL", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"])
def test_an_unknown_protocol_is_an_error_that_says_what_there_is(variable: str) -> None:
    with pytest.raises(ExportError) as error:
        exporters_from_environment({variable: "http/json"})
    assert str(error.value) == f"{variable}='http/json': takes grpc or http/protobuf"


# From a program's environment to the receiver


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_spans_arrive_over(programs: Programs, receiver: Receiver, protocol: str) -> None:
    worker = programs.start(receiver.grpc_environment if protocol == "grpc" else receiver.http_environment)
    assert worker.ask("steps(10) and otel_npu.flush(20)") is True
    assert len(receiver.named("worker_step")) == len(receiver.named("forward")) == 10
    assert programs.log == ""


def test_the_console_exporter_writes_to_the_programs_own_output(programs: Programs) -> None:
    worker = programs.start({"OTEL_TRACES_EXPORTER": "console"})
    worker.tell("steps(1) and otel_npu.flush(20)")
    lines = [worker.line() for _ in range(20)]
    assert any('"name": "forward"' in line for line in lines)


def test_the_file_exporter_writes_otlp_json(programs: Programs) -> None:
    """It has no variable that names a file: by its entry point it writes to the standard output."""
    pytest.importorskip("opentelemetry.exporter.otlp.json.file")
    worker = programs.start({"OTEL_TRACES_EXPORTER": "otlp_json_file"})
    worker.tell("steps(1) and otel_npu.flush(20) and None")
    written = eventually(lambda: json.loads(worker.line()), "a line of JSON")
    [resource_spans] = written["resourceSpans"]
    assert [span["name"] for span in resource_spans["scopeSpans"][0]["spans"]] == ["forward", "worker_step"]


@pytest.mark.slow
def test_two_exporters_get_the_same_spans(programs: Programs, receiver: Receiver) -> None:
    worker = programs.start({**receiver.grpc_environment, "OTEL_TRACES_EXPORTER": "otlp,console"})
    worker.tell("steps(1) and otel_npu.flush(20)")
    ids = {span.span_id for span in receiver.wait_for(2)}
    printed = ""
    while not all(f"0x{span_id}" in printed for span_id in ids):
        printed += worker.line()


def test_with_no_exporter_stages_are_still_captured_and_resolved(programs: Programs) -> None:
    worker = programs.start({"OTEL_TRACES_EXPORTER": "none", "OTEL_NPU_LOG_STAGES": "1"})
    assert worker.ask("steps(2, 'decode') and otel_npu.flush(20)") is True
    assert programs.log.count("Profile execute duration [Decode]: [forward]:") == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "complaint"),
    [
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "OTEL_TRACES_EXPORTER='zipkin': takes console, "),
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "http/json"}, "OTEL_EXPORTER_OTLP_PROTOCOL='http/json': takes grpc or "),
        ({"OTEL_EXPORTER_OTLP_TIMEOUT": "10s"}, "OTEL_EXPORTER_OTLP_TIMEOUT='10s': takes a number of seconds above 0"),
        ({"OTEL_EXPORTER_OTLP_COMPRESSION": "zstd"}, "OTEL_EXPORTER_OTLP_COMPRESSION='zstd': takes gzip or deflate"),
        ({"OTEL_EXPORTER_OTLP_HEADERS": "s3cret"}, "OTEL_EXPORTER_OTLP_HEADERS: takes name=value pairs"),
        ({"OTEL_EXPORTER_OTLP_CERTIFICATE": "/no"}, "OTEL_EXPORTER_OTLP_CERTIFICATE='/no': takes the path of a file"),
        ({"OTEL_BSP_MAX_QUEUE_SIZE": "lots"}, "OTEL_BSP_MAX_QUEUE_SIZE='lots': takes a whole number above 0"),
        ({"OTEL_SPAN_LINK_COUNT_LIMIT": "lots"}, "OTEL_SPAN_LINK_COUNT_LIMIT='lots': takes a whole number, 0 or more"),
    ],
)
def test_a_bad_variable_is_one_clear_line_and_the_program_runs_on(
    programs: Programs, receiver: Receiver, environment: dict[str, str], complaint: str
) -> None:
    worker = programs.start({**receiver.grpc_environment, **environment})
    assert worker.ask("steps(1)") == 1
    assert isinstance(worker.ask("otel_npu.flush(20)"), bool)
    [line] = programs.log.splitlines()
    assert complaint in line
    assert programs.relay()


def test_a_flush_does_not_claim_that_spans_went_to_an_exporter_that_is_not_there(programs: Programs) -> None:
    worker = programs.start({"OTEL_TRACES_EXPORTER": "zipkin"})
    assert worker.ask("steps(3) and otel_npu.flush(20)") is False
    worker.leave()
    eventually(lambda: not programs.relays(), "the relay has ended")
    assert "6 export_failed" in programs.log
