"""A session of one engine and its ranks, as whoever looks at it sees it: packets, with times that a test chooses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import msgspec

from otel_npu.wire import frames, looking
from tests.helpers.built import hello, scheduled, stage, step, updated

if TYPE_CHECKING:
    from collections.abc import Iterator

MS: Final = 1_000_000
DEVICE_NS: Final = 50_000 * MS
"""Device time minus host time."""
ENGINE: Final = 1


def seen(number: int, frame: Any) -> looking.Seen:
    """A packet that the process with this number has sent."""
    return looking.Seen(number, msgspec.Raw(frames.encode(frame)))


def hellos(ranks: int) -> Iterator[looking.Seen]:
    """The engine, and its ranks."""
    yield seen(ENGINE, hello(pid=100, instance_id="engine", device_kind=""))
    for rank in range(ranks):
        yield seen(2 + rank, hello(pid=101 + rank, instance_id=f"rank-{rank}"))
        yield seen(2 + rank, frames.Ping(0, DEVICE_NS + MS, MS, MS + 1000))


def engine_step(
    number: int, opened_ns: int, *, ranks: int = 2, kind: str = "decode", ms: float = 8.0, trace: bool = True
) -> Iterator[looking.Seen]:
    """A step of the engine: 1 ms of scheduling, and on each rank `forward` of so many ms with `attention` in it.

    The ranks launch in half a millisecond what their devices take so long for; the last rank is 1 ms late.
    """
    span_id, trace_id = number.to_bytes(8, "big"), (1 << 64 | number).to_bytes(16, "big")
    ids = {"trace_id": trace_id if trace else b"", "kept": False}
    told = {"ranks": ranks, "kind": kind, "total_tokens": 4, "total_requests": 2}
    yield seen(
        ENGINE, scheduled(number, opened_ns=opened_ns, scheduled_ns=opened_ns + MS, span_id=span_id, **ids, **told)
    )
    end_ns = 0
    for rank in range(ranks):
        host_ns = opened_ns + MS + (MS if rank and rank == ranks - 1 else 0)
        took_ns = round(ms * MS)
        end_ns = host_ns + took_ns + MS // 2
        on_device = {"device_ns": host_ns + DEVICE_NS + 1000, "stream_id": 7}
        stages = [
            stage(entered_ns=host_ns, exited_ns=host_ns + MS // 2, duration_ns=took_ns, **on_device),
            stage(
                name="attention",
                entered_ns=host_ns + 1000,
                exited_ns=host_ns + MS // 4,
                duration_ns=took_ns // 2,
                **on_device,
            ),
            stage(name="bookkeep", entered_ns=end_ns, exited_ns=end_ns + 1000, duration_ns=1000, device_ns=None),
        ]
        frame = step(
            number,
            **ids,
            span_id=(number << 8 | rank).to_bytes(8, "big"),
            parent_span_id=span_id,
            rank=rank,
            returns_output=not rank,
            kind=kind,
            opened_ns=host_ns,
            closed_ns=end_ns + 1000,
            seen_ns=end_ns + 1000,
            stages=stages,
            attributes={"npu.step.ranks": ranks},
        )
        yield seen(2 + rank, frames.Several([msgspec.Raw(frames.encode(frame))]))
    yield seen(ENGINE, updated(number, span_id=span_id, closed_ns=end_ns + MS))
