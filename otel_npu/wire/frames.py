"""The frames: msgpack arrays, one a packet, told apart by their first element.

Times are nanoseconds: `*_ns` of the host's monotonic clock, `device_ns` of the device's own. Ids are raw bytes.
"""

from __future__ import annotations

from typing import Final, TypeAlias

import msgspec

PROTOCOL: Final = 1
MAX_FRAME_BYTES: Final = 128 * 1024  # with what the kernel adds it fits a stock socket buffer of 208 KiB

Scalar: TypeAlias = str | bool | int | float
AttributeValue: TypeAlias = Scalar | list[Scalar]
Attributes: TypeAlias = dict[str, AttributeValue]


class Hello(msgspec.Struct, array_like=True, tag="hello", frozen=True):
    """The first frame of a connection: which process this is.

    The service's name and attributes travel as the environment gives them; the relay makes of them what the
    process's own SDK would.
    """

    protocol: int
    pid: int
    host: str
    instance_id: str
    executable: str
    service_name: str
    resource_attributes: str
    device_kind: str
    device_name: str
    device_resolution_ns: int


class Stage(msgspec.Struct, array_like=True, frozen=True):
    """One stage of a step. `parent` is the index of the stage around it in the step, or -1."""

    name: str
    parent: int
    entered_ns: int
    exited_ns: int
    device_ns: int | None
    duration_ns: int
    device_index: int
    stream_id: int
    error: str | None
    attributes: Attributes | None


class Step(msgspec.Struct, array_like=True, tag="step", frozen=True):
    """A step that is done, with all its stages in the order in which they were entered.

    Without ids it was not chosen to be a trace and only its times are of use. `bare` marks a stage that ran in no
    step: it has no step span. `dropped` counts what the process left out since its last frame, by reason.
    """

    trace_id: bytes
    span_id: bytes
    parent_span_id: bytes
    bare: bool
    number: int
    kind: str
    opened_ns: int
    closed_ns: int
    seen_ns: int
    error: str | None
    attributes: Attributes | None
    links: list[bytes]
    dropped: dict[str, int]
    stages: list[Stage]


class Unfinished(msgspec.Struct, array_like=True, tag="unfinished", frozen=True):
    """A stage that hangs: sent once, while it does."""

    trace_id: bytes
    parent_span_id: bytes
    step_number: int
    step_kind: str
    name: str
    entered_ns: int
    now_ns: int
    device_index: int


class Flush(msgspec.Struct, array_like=True, tag="flush", frozen=True):
    """Export all that came before this frame within so many seconds, then answer `Flushed`."""

    number: int
    timeout_seconds: float


class Flushed(msgspec.Struct, array_like=True, tag="flushed", frozen=True):
    """The relay's answer: whether all that came before was exported."""

    number: int
    complete: bool


Frame: TypeAlias = Hello | Step | Unfinished | Flush

LINK_BYTES: Final = 25  # trace id (16), span id (8), trace flags (1)

encode = msgspec.msgpack.Encoder().encode
decode_frame = msgspec.msgpack.Decoder(Frame).decode
decode_flushed = msgspec.msgpack.Decoder(Flushed).decode
