"""What a recording keeps, and what is written of it."""

from __future__ import annotations

import gzip
import json
import threading
import time
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import TracesData

from otel_npu.looking import otlp_json, perfetto
from otel_npu.looking import recording as recording_module
from otel_npu.looking.model import Model
from otel_npu.looking.otlp_json import ReadError
from otel_npu.looking.perfetto import lanes
from otel_npu.looking.recording import Recording
from otel_npu.looking.session import Connection, connect
from otel_npu.looking.span import Span
from otel_npu.wire import frames, rendezvous
from tests.helpers.built import hello, request, request_end, scheduled, stage, step
from tests.helpers.traced import Programs, eventually
from tests.helpers.watched import ENGINE, MS, engine_step, hellos, seen
from tests.relay.test_server import Relay

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

BEGAN_NS = 10**12
STEPS = 40


def recorded(ranks: int = 2, steps: int = STEPS) -> Recording:
    """One second with a step each 20 ms: 5 of them before it begins, and 5 after it has ended."""
    recording = Recording()
    recording.began_ns, recording.ended_ns = BEGAN_NS - MS, BEGAN_NS + steps * 20 * MS - MS
    views = list(hellos(ranks))
    for number in range(-5, steps + 5):
        ms = 30 if number == 7 else 8
        views += engine_step(number + 10, BEGAN_NS + number * 20 * MS, ranks=ranks, ms=ms)
    for index, view in enumerate(views):
        recording.add(view, index * 0.001)
    return recording


@pytest.fixture(scope="module")
def spans() -> list[Span]:
    return recorded().spans()


def test_every_step_that_began_meanwhile_is_there_with_all_its_ranks_and_no_other(spans: list[Span]) -> None:
    model = Model(spans)
    assert [each.attributes["npu.step.number"] for each in model.steps] == list(range(10, 10 + STEPS))
    for each in model.steps:
        assert each.engine is not None
        assert [run.rank for run in each.runs] == [0, 1]
        assert [span.name for span in each.runs[0].stages] == ["forward", "attention", "bookkeep (host)"]


def test_whether_a_step_is_a_trace_elsewhere_is_not_said(spans: list[Span]) -> None:
    assert not [span for span in spans if "npu.sampled.reason" in span.attributes]


def test_the_slowest_alone() -> None:
    model = Model(recorded().spans(slowest=2))
    assert 17 in [each.attributes["npu.step.number"] for each in model.steps]
    assert len(model.steps) == 2


def test_steps_that_were_never_traces_are_recorded_and_put_together() -> None:
    recording = Recording()
    recording.began_ns, recording.ended_ns = 0, 1 << 62
    for view in hellos(1):
        recording.add(view, 0.0)
    for view in engine_step(1, BEGAN_NS, ranks=1, trace=False):
        recording.add(view, 0.0)
    recording.add(seen(9, hello(pid=9)), 0.0)
    recording.add(seen(9, step(3, trace_id=b"", span_id=b"", kind="own")), 0.0)
    (own, of_engine) = sorted(Model(recording.spans()).steps, key=lambda each: each.engine is not None)
    assert len({span.trace_id for span in (of_engine.engine, *(run.span for run in of_engine.runs)) if span}) == 1
    assert own.kind == "own"


def test_a_ranks_step_whose_engine_is_elsewhere_is_a_step() -> None:
    recording = Recording()
    recording.began_ns, recording.ended_ns = 0, 1 << 62
    for view in (*hellos(2), *list(engine_step(1, BEGAN_NS))[1:-1]):
        recording.add(view, 0.0)
    (only,) = Model(recording.spans()).steps
    assert (only.engine, [run.rank for run in only.runs]) == (None, [0, 1])


# OTLP JSON.


def test_what_is_written_is_read_again(spans: list[Span]) -> None:
    text = "".join(otlp_json.lines(spans))
    again = otlp_json.from_text(text, "x")
    assert sorted(again, key=lambda span: span.span_id) == sorted(spans, key=lambda span: span.span_id)


def test_what_is_written_is_otlp_json_as_protobuf_has_it(spans: list[Span]) -> None:
    from google.protobuf import json_format

    (line, *_) = otlp_json.lines(spans)
    document = json.loads(line)
    for span in (span for resource in document["resourceSpans"] for span in resource["scopeSpans"][0]["spans"]):
        for key in ("traceId", "spanId", "parentSpanId"):  # hexadecimal in OTLP, base64 in protobuf's own JSON
            span[key] = ""
    parsed = json_format.ParseDict(document, TracesData())
    assert len(parsed.resource_spans[0].scope_spans[0].spans) > 0


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "holds no spans"),
        (b'{"resourceMetrics":[]}\n', "holds no spans"),
        (b"GIF89a", "line 1: no OTLP JSON"),
        (b'{"resourceSpans":[{"scopeSpans":[{"spans":[{"name":"x"}]}]}]}', "line 1: no OTLP JSON: KeyError"),
        (b"[1]\n", "line 1: no OTLP JSON"),
        (b"\xff\xfe", "can't be read"),
    ],
)
def test_what_is_no_file_of_spans_is_one_line(tmp_path: Path, content: bytes, complaint: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(ReadError, match=complaint):
        otlp_json.read(path)


def test_a_document_over_several_lines_and_a_packed_one_are_read_too(tmp_path: Path, spans: list[Span]) -> None:
    (first, *_) = otlp_json.lines(spans)
    path = tmp_path / "file"
    path.write_text(json.dumps(json.loads(first), indent=2))
    unpacked = otlp_json.read(path)
    path.write_bytes(gzip.compress(first.encode()))
    assert otlp_json.read(path) == unpacked


# Perfetto.


def events_of(spans: Sequence[Span]) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = json.loads(gzip.decompress(perfetto.write(spans)))["traceEvents"]
    return made


def test_the_slices_of_each_track_nest_as_the_format_demands(spans: list[Span]) -> None:
    tracks: defaultdict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    for event in events_of(spans):
        if event["ph"] == "X":
            start = round(event["ts"] * 1000)
            tracks[event["pid"], event["tid"]].append((start, start + round(event["dur"] * 1000)))
    assert sum(map(len, tracks.values())) == len(spans)
    for slices in tracks.values():
        open_until: list[int] = []
        for start, end in sorted(slices, key=lambda each: (each[0], -each[1])):
            while open_until and open_until[-1] <= start:
                open_until.pop()
            assert not open_until or end <= open_until[-1]
            open_until.append(end)


def test_each_rank_and_stream_has_its_track_and_the_engine_points_at_its_ranks(spans: list[Span]) -> None:
    events = events_of(spans)
    names = {event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert {"engine steps", "rank 0 steps", "rank 1 device 0 stream 7", "rank 0 host"} <= names
    flows = Counter(event["ph"] for event in events if event["ph"] in "sf")
    assert flows == {"s": 2 * STEPS, "f": 2 * STEPS}
    ends = {event["id"] for event in events if event["ph"] == "f"}
    assert {event["id"] for event in events if event["ph"] == "s"} == ends
    counters = {event["name"] for event in events if event["ph"] == "C"}
    assert {"tokens", "requests", "idle ms, rank 1"} <= counters


def test_what_overlaps_without_being_inside_has_a_row_of_its_own() -> None:
    def span(start: int, end: int) -> Span:
        return Span("x", "t", f"{start}-{end}", "", start, end, {}, {})

    made = [span(0, 10), span(2, 5), span(5, 8), span(8, 12), span(12, 13), span(20, 20), span(20, 25)]
    rows = lanes(made)
    assert [[each.span_id for each in row] for row in rows] == [
        ["0-10", "2-5", "5-8", "12-13", "20-25", "20-20"],
        ["8-12"],
    ]


# From a running session.


@pytest.fixture
def relay() -> Iterator[Relay]:
    running = Relay()
    yield running
    running.end()


def test_requests_that_end_meanwhile_are_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording_module, "WARM_UP_SECONDS", 0.05)
    monkeypatch.setattr(recording_module, "TAIL_SECONDS", 0.1)
    with Programs(tmp_path) as programs:
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(programs.run_folder))
        worker = programs.start({"OTEL_NPU_SESSION": "requests", "OTEL_TRACES_EXPORTER": "none"})
        worker.ask("steps(1)")
        (path,) = programs.sockets
        engine = rendezvous.connect(path)
        assert engine is not None
        with engine, connect(session="requests") as connection:
            made, done = Recording(), threading.Event()
            thread = threading.Thread(target=made.run, args=(connection, 60.0, done.is_set))
            thread.start()
            eventually(lambda: made.began_ns, "it records")
            now_ns = time.time_ns()
            for frame in (
                hello(pid=77),
                request(5, arrived_unix_ns=now_ns, response_id="cmpl-5"),
                scheduled(1, requests=[5], tokens=[1], prefills=[True], first=[5], cached=[0], fetched=[0]),
                request_end(5, reason="abort", ended_unix_ns=now_ns + MS),
            ):
                engine.send(frames.encode(frame))
            worker.ask("steps(3)")
            eventually(lambda: any(type(view).__name__ == "Made" for _, view in made._views), "the request came")
            done.set()
            thread.join(60)
            model = Model(made.spans(connection))
    assert not made.cut
    assert len(model.steps) == 3
    (ended,) = model.requests
    assert ended.name == "cmpl-5"
    assert [span.name for span in ended.spans] == ["queue"]


def test_a_relay_that_goes_leaves_what_was_recorded_until_then(relay: Relay) -> None:
    client = relay.client()
    relay.run()
    connection = Connection("x", client.connection)
    recording = Recording()
    thread = threading.Thread(target=recording.run, args=(connection, 60.0))
    thread.start()
    eventually(lambda: recording.began_ns, "it records")
    relay.end()
    thread.join(60)
    assert "session x has ended" in recording.cut


def test_an_unreadable_frame_costs_no_other() -> None:
    recording = Recording()
    recording.began_ns, recording.ended_ns = 0, 1 << 62
    recording.add(seen(ENGINE, stage()), 0.0)
    for view in (*hellos(2), *engine_step(1, BEGAN_NS)):
        recording.add(view, 0.0)
    assert len(Model(recording.spans()).steps) == 1
