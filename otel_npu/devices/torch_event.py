"""Any other torch accelerator, through torch's own API: elapsed times from a reference event."""

from __future__ import annotations

import functools
import threading
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from otel_npu.devices.ping import Ping, ping

if TYPE_CHECKING:
    from collections.abc import Sequence

    from otel_npu.devices.device import Pair, Pool

# torch gives elapsed time as float milliseconds, on most devices of float32 precision: up to 4 s apart the steps
# between two values are below half a microsecond.
_RENEW_NS: Final = 4_000_000_000


class _Reference(NamedTuple):
    """The event that device times are counted from: done, and not recorded again while it serves."""

    event: Any
    origin_ns: int


class TorchEvents:
    """`Device` on the generic `torch.Event`. Its clock starts at the first event that is read."""

    host_clock = False
    resolution_ns = 1
    pool_pairs = 1024

    def __init__(self, kind: str) -> None:
        import torch

        self.kind = kind
        self.pools: dict[int, Pool] = {}
        self._torch = torch
        self._module = getattr(torch, kind)
        self.current_stream = functools.partial(torch._C._accelerator_getStream, -1)
        self.current_stream_key = lambda: stream_key(self.current_stream())
        self.capturing = getattr(self._module, "is_current_stream_capturing", lambda: False)
        self._references: dict[int, _Reference] = {}
        self._reading = threading.Lock()  # two threads must not put the same old reference into pairs of theirs
        self._pings: dict[int, tuple[Any, Any]] = {}

    def new_event(self, device_index: int) -> Any:
        """A generic event with timing."""
        return self._torch._C.Event(device=f"{self.kind}:{device_index}", enable_timing=True)

    def made(self, _event: object) -> bool:
        """Only the device's own runtime knows."""
        return True

    def adopt_thread(self, device_index: int) -> None:
        """Set the thread's device."""
        self._torch.accelerator.set_device_index(device_index)

    def name(self, device_index: int) -> str:
        """The device's model where its torch module says it."""
        get_name = getattr(self._module, "get_device_name", None)
        return str(get_name(device_index)) if get_name else ""

    def ping(self, device_index: int, budget_ns: int) -> Ping | None:
        """The device's clock, from an event on a side stream; None until there is a reference to count from."""
        reference = self._references.get(device_index)
        if reference is None:
            return None
        if device_index not in self._pings:
            stream = self._torch.Stream(device=f"{self.kind}:{device_index}")
            self._pings[device_index] = (stream, self.new_event(device_index))
        stream, event = self._pings[device_index]
        answer = ping(
            lambda: event.record(stream),
            event.query,
            lambda: reference.origin_ns + _nanoseconds(reference.event, event),
            budget_ns,
        )
        # If it was renewed meanwhile, the event counted from may have been recorded again.
        return answer if self._references[device_index] is reference else None

    def captured(self, _stream_key: Any) -> bool:
        """Whether a stream is captured can be asked in its own thread only."""
        return False

    def read(self, device_index: int, pairs: Sequence[Pair]) -> list[tuple[int, int]]:
        """Start and duration of each pair, in nanoseconds since the device's first event was read.

        Raises:
            RuntimeError: torch reports an error for one of the events.
        """
        with self._reading:
            return self._read(device_index, pairs)

    def _read(self, device_index: int, pairs: Sequence[Pair]) -> list[tuple[int, int]]:
        first = pairs[0]
        reference = self._references.get(device_index)
        if reference is None:
            reference = self._references[device_index] = _Reference(first.start, 0)
        times = [
            (reference.origin_ns + _nanoseconds(reference.event, pair.start), _nanoseconds(pair.start, pair.end))
            for pair in pairs
        ]
        if first.start is reference.event:
            first.replace_start(self.new_event(device_index))
        elif times[0][0] - reference.origin_ns > _RENEW_NS:
            # The newest start becomes the reference, and the old one takes its place in the pair: nothing waits,
            # and no event is made.
            self._references[device_index] = _Reference(first.start, times[0][0])
            first.replace_start(reference.event)
        return times


def stream_key(stream: Any) -> tuple[int, int]:
    """What tells a torch stream from others. A stream itself says that it equals whatever is not a stream."""
    return stream.device_index, stream.stream_id


def _nanoseconds(start: Any, end: Any) -> int:
    return round(float(start.elapsed_time(end)) * 1e6)
