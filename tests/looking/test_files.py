"""What others write is read as it was meant, and what is written of requests and errors shows them."""

from __future__ import annotations

import gzip
import json
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from otel_npu.looking import otlp_json, perfetto
from otel_npu.looking.otlp_json import ReadError
from otel_npu.looking.span import Span


def document(**span: Any) -> dict[str, Any]:
    made = {"name": "forward", "traceId": "0" * 31 + "1", "spanId": "0" * 15 + "1", **span}
    made |= {"startTimeUnixNano": "1000", "endTimeUnixNano": 2000}  # both are in use
    return {"resourceSpans": [{"scopeSpans": [{"spans": [made]}]}]}


def read(**span: Any) -> Span:
    (found,) = otlp_json.from_text(json.dumps(document(**span)), "file")
    return found


@pytest.mark.parametrize(
    ("status", "error"),
    [
        ({}, None),
        ({"code": 1}, ""),
        ({"code": "STATUS_CODE_OK"}, ""),
        ({"code": 2, "message": "ValueError"}, "ValueError"),
        ({"code": "STATUS_CODE_ERROR"}, "error"),
    ],
)
def test_a_status_is_told_by_its_number_or_its_name(status: dict[str, Any], error: str | None) -> None:
    assert read(status=status).error == error


def test_attributes_of_every_kind_are_plain_values() -> None:
    given = {
        "text": {"stringValue": "a"},
        "number": {"intValue": "7"},
        "share": {"doubleValue": 0.5},
        "flag": {"boolValue": True},
        "list": {"arrayValue": {"values": [{"intValue": 1}, {"intValue": "2"}]}},
        "empty list": {"arrayValue": {}},
        "map": {"kvlistValue": {"values": [{"key": "a", "value": {"stringValue": "b"}}]}},
        "nothing": {},
    }
    span = read(attributes=[{"key": key, "value": value} for key, value in given.items()])
    assert span.attributes == {
        "text": "a",
        "number": 7,
        "share": 0.5,
        "flag": True,
        "list": [1, 2],
        "empty list": [],
        "map": {"a": "b"},
        "nothing": None,
    }


def full_span() -> Span:
    attributes = {"text": "a", "flag": True, "number": 7, "share": 0.5, "list": ["a", "b"]}
    return Span(
        *("decode", "0" * 31 + "1", "0" * 15 + "2", "0" * 15 + "1", 1000, 2000, attributes, {"service.name": "llm"}),
        *("ValueError", [("0" * 31 + "3", "0" * 15 + "4")], [(1500, "preempted")]),
    )


@pytest.mark.parametrize("error", [None, "", "ValueError"])
def test_all_that_a_span_says_is_read_as_it_was_written(error: str | None) -> None:
    span = full_span()
    span.error = error
    assert otlp_json.from_text("".join(otlp_json.lines([span])), "file") == [span]


def test_what_a_relay_has_exported_is_the_same_in_protobuf() -> None:
    request = ExportTraceServiceRequest()
    made = request.resource_spans.add().scope_spans.add().spans.add()
    made.name, made.trace_id, made.span_id = "decode", b"\1" * 16, b"\2" * 8
    made.parent_span_id = b"\3" * 8
    made.start_time_unix_nano, made.end_time_unix_nano = 1000, 2000
    made.status.code = 2
    made.links.add(trace_id=b"\4" * 16, span_id=b"\5" * 8)
    made.events.add(time_unix_nano=1500, name="preempted")
    (span,) = otlp_json.from_protobuf(request.SerializeToString())
    assert (span.trace_id, span.span_id, span.parent_id) == ("01" * 16, "02" * 8, "03" * 8)
    assert (span.error, span.links, span.events) == ("error", [("04" * 16, "05" * 8)], [(1500, "preempted")])


def test_empty_lines_are_nothing_and_the_line_that_is_no_span_is_named() -> None:
    line = json.dumps(document())
    assert len(otlp_json.from_text(f"\n{line}\n\n{line}\n", "file")) == 2
    with pytest.raises(ReadError, match="file, line 3: no OTLP JSON"):
        otlp_json.from_text(f"{line}\n{line}\nbroken\n", "file")


# Perfetto.


def events_of(*spans: Span) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = json.loads(gzip.decompress(perfetto.write(spans)))["traceEvents"]
    return made


def phase(name: str, request: int, start_ms: int, end_ms: int) -> Span:
    times = start_ms * 10**6, end_ms * 10**6
    return Span(name, f"{request:032x}", f"{name}{request}", "caller", *times, {}, {"service.instance.id": "engine"})


def test_requests_have_a_track_of_their_own_and_those_that_wait_are_counted() -> None:
    events = events_of(
        *(phase("queue", 1, 0, 10), phase("prefill", 1, 10, 20)),
        *(phase("queue", 2, 5, 30), phase("prefill", 2, 30, 40)),
    )
    slices = [event for event in events if event["ph"] == "X"]
    assert sorted(event["name"] for event in slices) == ["prefill", "prefill", "queue", "queue"]
    rows = [event["args"]["name"] for event in events if event["name"] == "thread_name"]
    assert rows == ["requests", "requests (2)"]  # they overlap
    waiting = [(event["ts"], event["args"]["requests waiting"]) for event in events if event["ph"] == "C"]
    assert waiting == [(0, 1), (5000, 2), (10_000, 1), (30_000, 0)]


def test_an_error_is_said_and_a_step_of_no_engine_has_no_arrow() -> None:
    attributes = {"npu.step.number": 1, "npu.step.kind": "decode", "nothing": None}
    step = Span("worker_step", "1" * 32, "2" * 16, "", 0, 10**6, attributes, {"service.name": "llm"}, "ValueError")
    stage = Span("forward", "1" * 32, "3" * 16, "2" * 16, 0, 10**6, {"npu.stage.host_duration": 0.001}, {})
    events = events_of(step, stage)
    (made,) = [event for event in events if event["ph"] == "X" and event["name"] == "worker_step"]
    assert made["args"] == {
        "npu.step.number": 1,
        "npu.step.kind": "decode",
        "error": "ValueError",
        "trace_id": "1" * 32,
        "span_id": "2" * 16,
    }
    assert not [event for event in events if event["ph"] in "sf"]
    assert "steps" in [event["args"]["name"] for event in events if event["name"] == "thread_name"]
