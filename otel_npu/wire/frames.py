"""The frames: msgpack arrays, one a packet, told apart by their first element.

Times are nanoseconds: `*_ns` of the host's monotonic clock, `device_ns` of the device's own. Ids are raw bytes.
"""

from __future__ import annotations

from typing import Annotated, Final, TypeAlias

import msgspec

PROTOCOL: Final = 1
MAX_FRAME_BYTES: Final = 128 * 1024  # with what the kernel adds it fits a stock socket buffer of 208 KiB

# Checked by whoever decodes, at no cost to whoever sends: one value that OTLP can't hold fails a whole export.
Nanoseconds: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]
DeviceNanoseconds: TypeAlias = Annotated[int, msgspec.Meta(ge=-(1 << 62), le=1 << 62)]
Integer: TypeAlias = Annotated[int, msgspec.Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]

Scalar: TypeAlias = str | bool | Integer | float
AttributeValue: TypeAlias = Scalar | list[Scalar]
Attributes: TypeAlias = dict[str, AttributeValue]


class Hello(msgspec.Struct, array_like=True, tag="hello", frozen=True):
    """The first frame of a connection: which process this is.

    The service's name and attributes travel as the environment gives them; the relay makes of them what the
    process's own SDK would.
    """

    protocol: int
    pid: Count
    host: str
    instance_id: str
    executable: str
    service_name: str
    resource_attributes: str
    device_kind: str
    device_name: str
    device_resolution_ns: Nanoseconds


class Stage(msgspec.Struct, array_like=True, frozen=True):
    """One stage of a step. `parent` is the index of the stage around it in the step, or -1."""

    name: str
    parent: int
    entered_ns: Nanoseconds
    exited_ns: Nanoseconds
    device_ns: DeviceNanoseconds | None
    duration_ns: Nanoseconds
    device_index: Integer
    stream_id: Integer
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
    number: Count
    kind: str
    opened_ns: Nanoseconds
    closed_ns: Nanoseconds
    seen_ns: Nanoseconds
    error: str | None
    attributes: Attributes | None
    links: list[bytes]
    dropped: dict[str, Count]
    stages: list[Stage]


class Ping(msgspec.Struct, array_like=True, tag="ping", frozen=True):
    """A look at a device's clock: it showed `device_ns` between two instants of the host's."""

    device_index: Integer
    device_ns: DeviceNanoseconds
    before_ns: Nanoseconds
    seen_ns: Nanoseconds


class Unfinished(msgspec.Struct, array_like=True, tag="unfinished", frozen=True):
    """A stage that hangs: sent once, while it does."""

    trace_id: bytes
    parent_span_id: bytes
    step_number: Count
    step_kind: str
    name: str
    entered_ns: Nanoseconds
    now_ns: Nanoseconds
    device_index: Integer


class Flush(msgspec.Struct, array_like=True, tag="flush", frozen=True):
    """Export all that came before this frame within so many seconds, then answer `Flushed`."""

    number: Count
    timeout_seconds: Annotated[float, msgspec.Meta(ge=0, le=1e9)]


class Flushed(msgspec.Struct, array_like=True, tag="flushed", frozen=True):
    """The relay's answer: whether all that came before was exported."""

    number: Count
    complete: bool


Frame: TypeAlias = Hello | Step | Ping | Unfinished | Flush

LINK_BYTES: Final = 25  # trace id (16), span id (8), trace flags (1)

encode = msgspec.msgpack.Encoder().encode
decode_flushed = msgspec.msgpack.Decoder(Flushed).decode
_decode = msgspec.msgpack.Decoder(Frame).decode


def decode_frame(packet: bytes | memoryview) -> Frame:
    """The frame in a packet.

    Raises:
        ValueError: It is not a frame, or holds what can't be; the text says what.
    """
    frame: Frame = _decode(packet)
    if isinstance(frame, Step):
        _check_id("trace id", frame.trace_id, 16, may_be_absent=True)
        _check_id("span id", frame.span_id, 8, may_be_absent=not frame.trace_id or frame.bare)
        _check_id("parent span id", frame.parent_span_id, 8, may_be_absent=True)
        for index, stage in enumerate(frame.stages):
            if not -1 <= stage.parent < index:
                raise ValueError(f"stage {index} of {len(frame.stages)} lies in stage {stage.parent}")
        for link in frame.links:
            if len(link) != LINK_BYTES:
                raise ValueError(f"a link of {len(link)} bytes, not {LINK_BYTES}")
    elif isinstance(frame, Ping):
        if frame.seen_ns < frame.before_ns:
            raise ValueError("a ping that was seen before it was sent")
    elif isinstance(frame, Unfinished):
        _check_id("trace id", frame.trace_id, 16, may_be_absent=False)
        _check_id("parent span id", frame.parent_span_id, 8, may_be_absent=True)
        if frame.now_ns < frame.entered_ns:
            raise ValueError("a stage that is entered in the future")
    return frame


def _check_id(what: str, value: bytes, length: int, *, may_be_absent: bool) -> None:
    if not value and may_be_absent:
        return
    if len(value) != length or not any(value):
        raise ValueError(f"a {what} of {len(value)} bytes, not {length}, or all zero")
