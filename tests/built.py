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
