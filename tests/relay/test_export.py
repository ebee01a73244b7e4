"""Spans leave through the standard exporters, behind a queue that is bounded and counts what it loses."""

from __future__ import annotations

import json
import logging
import threading
from typing import TYPE_CHECKING, Any

import pytest
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SpanExporter, SpanExportResult

from otel_npu.drops import Drops
from otel_npu.relay.export import Account, ExportError, ExportQueue, exporters_from_environment
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


def spans(*names: str, **attributes: Any) -> list[ReadableSpan]:
    return [ReadableSpan(name, attributes=attributes) for name in names]


def numbered(numbers: range) -> list[ReadableSpan]:
    return spans(*map(str, numbers))


class Bench:
    """A queue, its exporter and its one client."""

    def __init__(self, *, exporters: int = 1, **environment: str) -> None:
        self.exporters = [Exporter() for _ in range(exporters)]
        self.exporter = self.exporters[0]
        self.drops = Drops()
        self.account = Account()
        # Nothing leaves by the clock: only full batches and what is flushed.
        self.queue = ExportQueue(self.exporters, self.drops, {"OTEL_BSP_SCHEDULE_DELAY": "3600000", **environment})

    def put(self, *batch: ReadableSpan) -> None:
        self.queue.put(batch, self.account)

    def flush(self, timeout_seconds: float = PATIENCE_SECONDS) -> bool:
        return self.queue.flush(self.account, self.account.accepted, timeout_seconds)

    def hold(self) -> None:
        """Keep the exporter inside its next export."""
        self.exporter.released.clear()
        self.exporter.entered.clear()


# The queue


def test_a_flush_exports_all_in_order() -> None:
    bench = Bench()
    bench.put(*numbered(range(100)))
    bench.put(*numbered(range(100, 150)))
    assert bench.flush()
    assert bench.exporter.names == [str(number) for number in range(150)]
    assert bench.drops.take_line() == ""


def test_a_full_batch_leaves_by_itself() -> None:
    bench = Bench(OTEL_BSP_MAX_EXPORT_BATCH_SIZE="10")
    bench.put(*numbered(range(25)))
    eventually(lambda: len(bench.exporter.batches) == 2, "two batches are full")
    assert [len(batch) for batch in bench.exporter.batches] == [10, 10]
    assert bench.flush()
    assert [len(batch) for batch in bench.exporter.batches] == [10, 10, 5]


def test_what_is_queued_leaves_after_the_delay() -> None:
    bench = Bench(OTEL_BSP_SCHEDULE_DELAY="1")
    bench.put(*spans("late"))
    assert bench.exporter.entered.wait(PATIENCE_SECONDS)


def test_beyond_its_bound_the_queue_drops_the_oldest_and_counts_them() -> None:
    bench = Bench(OTEL_BSP_MAX_QUEUE_SIZE="100", OTEL_BSP_MAX_EXPORT_BATCH_SIZE="1")
    bench.hold()
    bench.put(*spans("in flight"))
    assert bench.exporter.entered.wait(PATIENCE_SECONDS)
    for number in range(250):
        bench.put(*spans(str(number)))
        assert len(bench.queue._queue) <= 100
    bench.exporter.released.set()
    assert not bench.flush()
    assert bench.exporter.names == ["in flight", *(str(number) for number in range(150, 250))]
    assert bench.drops.take_unsent() == {"queue_full": 150}
    assert bench.flush()


def test_a_step_larger_than_the_queue_is_cut_to_it() -> None:
    bench = Bench(OTEL_BSP_MAX_QUEUE_SIZE="10")
    bench.put(*numbered(range(30)))
    assert not bench.flush()
    assert bench.exporter.names == [str(number) for number in range(20, 30)]
    assert bench.drops.take_unsent() == {"queue_full": 20}


def failing() -> SpanExportResult:
    return SpanExportResult.FAILURE


def raising() -> SpanExportResult:
    raise RuntimeError("no such collector")


@pytest.mark.parametrize("instead", [failing, raising])
def test_spans_that_can_not_be_exported_are_counted_and_the_next_are_tried(
    instead: Callable[[], SpanExportResult],
) -> None:
    bench = Bench()
    bench.exporter.instead = instead
    bench.put(*numbered(range(7)))
    assert not bench.flush()
    assert bench.drops.take_unsent() == {"export_failed": 7}
    bench.exporter.instead = lambda: SpanExportResult.SUCCESS
    bench.put(*spans("next"))
    assert bench.flush()
    assert bench.exporter.names[-1] == "next"


def test_an_exporter_that_raises_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench()
    bench.exporter.instead = raising
    bench.put(*spans("lost"))
    bench.flush()
    [record] = caplog.records
    assert record.getMessage() == "Exporter failed: no such collector"


def test_one_exporter_that_fails_does_not_keep_spans_from_the_other() -> None:
    bench = Bench(exporters=2)
    bench.exporters[0].instead = raising
    bench.put(*spans("forward"))
    assert not bench.flush()
    assert bench.exporters[1].names == ["forward"]
    assert bench.drops.take_unsent() == {"export_failed": 1}


def test_the_counts_on_a_step_span_that_is_lost_go_with_a_later_one() -> None:
    """Else what was dropped while the receiver was down would never be known: its count was dropped with it."""
    bench = Bench()
    bench.exporter.instead = failing
    bench.put(*spans("worker_step", **{"npu.dropped.pool_exhausted": 3, "npu.dropped.queue_full": 5}))
    bench.flush()
    assert bench.drops.take_unsent() == {"export_failed": 1, "pool_exhausted": 3, "queue_full": 5}
    assert bench.drops.take_line() == "1 export_failed"  # the log has had the others


def test_so_do_those_on_one_that_the_queue_drops() -> None:
    bench = Bench(OTEL_BSP_MAX_QUEUE_SIZE="1")
    bench.put(*spans("worker_step", **{"npu.dropped.bad_link": 2}), *spans("worker_step"))
    assert bench.drops.take_unsent() == {"queue_full": 1, "bad_link": 2}


def test_a_flush_out_of_time_says_so() -> None:
    bench = Bench()
    bench.hold()
    bench.put(*spans("slow"))
    assert not bench.flush(timeout_seconds=0.01)
    bench.exporter.released.set()
    assert bench.flush()


def test_closing_exports_the_rest_and_shuts_the_exporters_down() -> None:
    bench = Bench(exporters=2)
    bench.put(*spans("last"))
    bench.queue.close(PATIENCE_SECONDS)
    for exporter in bench.exporters:
        assert exporter.names == ["last"]
        assert exporter.is_shut_down.wait(PATIENCE_SECONDS)


def test_closing_waits_no_longer_than_it_may_and_counts_what_is_left() -> None:
    bench = Bench(OTEL_BSP_MAX_EXPORT_BATCH_SIZE="2")
    bench.hold()
    bench.put(*numbered(range(5)))
    assert bench.exporter.entered.wait(PATIENCE_SECONDS)
    bench.queue.close(0.01)
    assert bench.drops.take_line() == "5 export_failed"
    bench.exporter.released.set()


def test_without_an_exporter_nothing_is_kept() -> None:
    bench = Bench()
    queue = ExportQueue([], bench.drops, {})
    queue.put(numbered(range(1000)), bench.account)
    assert len(queue._queue) == 0
    assert queue.flush(bench.account, bench.account.accepted, 0)


@pytest.mark.parametrize(
    "variable", ["OTEL_BSP_SCHEDULE_DELAY", "OTEL_BSP_MAX_QUEUE_SIZE", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE"]
)
@pytest.mark.parametrize("value", ["many", "0", "-5", "1.5"])
def test_a_bad_number_is_one_clear_line_and_the_default(
    caplog: pytest.LogCaptureFixture, variable: str, value: str
) -> None:
    good, bad = ExportQueue([], Drops(), {}), ExportQueue([], Drops(), {variable: value})
    [record] = caplog.records
    assert record.levelno == logging.ERROR
    assert f"{variable}={value!r}: takes a whole number above 0" in record.getMessage()
    assert (bad._delay, bad._max_queue, bad._max_batch) == (good._delay, good._max_queue, good._max_batch)


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


@pytest.mark.parametrize(
    ("environment", "complaint"),
    [
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "OTEL_TRACES_EXPORTER='zipkin': takes console, "),
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "http/json"}, "OTEL_EXPORTER_OTLP_PROTOCOL='http/json': takes grpc or "),
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
