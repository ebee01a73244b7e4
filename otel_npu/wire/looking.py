"""What a relay tells whoever looks at it, who began with `frames.Look`: msgpack arrays, one a packet, as frames are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeAlias

import msgspec

from otel_npu.wire import frames

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_PACKET_BYTES: Final = frames.MAX_FRAME_BYTES + 64
"""A frame that is passed on, and what stands before it."""


class Process(msgspec.Struct, array_like=True, frozen=True):
    """A traced process, by the number of its connection, and whether it captures."""

    number: int
    pid: int
    host: str
    executable: str
    service_name: str
    device_kind: str
    device_name: str
    on: bool


class Session(msgspec.Struct, array_like=True, tag="session", frozen=True):
    """The answer to each `Look`: the relay, and all processes that have said hello.

    `silent` counts connections that have not. `dropped` counts what was left out since the relay began, by reason, in
    the processes and in itself. `waiting_bytes` of spans wait to be exported, of at most `limit_bytes`.
    `unseen` counts the packets that whoever asks has not got, because it read too slowly.
    """

    pid: int
    processes: list[Process]
    silent: int
    dropped: dict[str, int]
    waiting_bytes: int
    limit_bytes: int
    exported_spans: int
    unseen: int


class Seen(msgspec.Struct, array_like=True, tag="seen", frozen=True):
    """A packet that the process with this number has sent, as it is."""

    number: int
    packet: msgspec.Raw


class Made(msgspec.Struct, array_like=True, tag="made", frozen=True):
    """The spans of a request, or of something else that is in no step: an OTLP `ExportTraceServiceRequest`."""

    request: bytes


View: TypeAlias = Session | Seen | Made

encode: Final[Callable[[View], bytes]] = msgspec.msgpack.Encoder().encode
decode: Final[Callable[[bytes], View]] = msgspec.msgpack.Decoder(View).decode
