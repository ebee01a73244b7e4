"""Frames with plausible fields, but for those that a test cares about."""

from __future__ import annotations

from typing import Any

from otel_npu.wire import frames


def hello(**changes: Any) -> frames.Hello:
    fields: dict[str, Any] = {
        "protocol": frames.PROTOCOL,
        "pid": 1,
        "host": "host",
        "instance_id": "instance",
        "executable": "/usr/bin/python",
        "service_name": "",
        "resource_attributes": "",
        "device_kind": "simulated",
        "device_name": "",
        "device_resolution_ns": 1,
        **changes,
    }
    return frames.Hello(**fields)


def stage(**changes: Any) -> frames.Stage:
    fields: dict[str, Any] = {
        "name": "forward",
        "parent": -1,
        "entered_ns": 1000,
        "exited_ns": 2000,
        "device_ns": 5000,
        "duration_ns": 900,
        "device_index": 0,
        "stream_id": 0,
        "error": None,
        "attributes": None,
        **changes,
    }
    return frames.Stage(**fields)


def step(number: int = 1, /, **changes: Any) -> frames.Step:
    fields: dict[str, Any] = {
        "trace_id": b"t" * 16,
        "span_id": b"s" * 8,
        "parent_span_id": b"",
        "bare": False,
        "rank": -1,
        "returns_output": False,
        "number": number,
        "kind": "decode",
        "opened_ns": 900,
        "closed_ns": 2100,
        "seen_ns": 3000,
        "error": None,
        "attributes": None,
        "links": [],
        "dropped": {},
        "stages": [stage()],
        **changes,
    }
    return frames.Step(**fields)


def unfinished(**changes: Any) -> frames.Unfinished:
    fields: dict[str, Any] = {
        "trace_id": b"t" * 16,
        "parent_span_id": b"s" * 8,
        "step_number": 7,
        "step_kind": "decode",
        "name": "forward",
        "entered_ns": 1_000,
        "now_ns": 30_000_001_000,
        "device_index": 0,
        **changes,
    }
    return frames.Unfinished(**fields)


def request(number: int = 1, /, **changes: Any) -> frames.Request:
    fields: dict[str, Any] = {
        "key": number.to_bytes(8, "big"),
        "number": number,
        "trace_id": b"r" * 16,
        "parent_span_id": number.to_bytes(8, "big"),
        "request_id": f"cmpl-{number}",
        "arrived_unix_ns": 1_700_000_000_000_000_000,
        **changes,
    }
    return frames.Request(**fields)


def scheduled(number: int = 1, /, **changes: Any) -> frames.Scheduled:
    fields: dict[str, Any] = {
        "trace_id": b"t" * 16,
        "span_id": number.to_bytes(8, "big"),
        "number": number,
        "kind": "decode",
        "opened_ns": 500,
        "scheduled_ns": 600,
        "ranks": 1,
        "total_tokens": 1,
        "total_requests": 1,
        "requests": [],
        "tokens": [],
        "prefills": [],
        "preempted": [],
        "ended": [],
        "dropped": {},
        **changes,
    }
    return frames.Scheduled(**fields)


def updated(number: int = 1, /, **changes: Any) -> frames.Updated:
    fields: dict[str, Any] = {
        "span_id": number.to_bytes(8, "big"),
        "closed_ns": 9000,
        "requests": [],
        "new_tokens": [],
        "finished": [],
        **changes,
    }
    return frames.Updated(**fields)


def transfers(**changes: Any) -> frames.Transfers:
    return frames.Transfers(**{"connector": "Connector", "at_ns": 700, **changes})


def request_end(number: int = 1, /, **changes: Any) -> frames.RequestEnd:
    fields: dict[str, Any] = {
        "key": number.to_bytes(8, "big"),
        "ended_unix_ns": 1_700_000_001_000_000_000,
        "output_tokens": 1,
        "reason": "stop",
        "dropped": {},
        **changes,
    }
    return frames.RequestEnd(**fields)
