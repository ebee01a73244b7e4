"""Ascend NPUs through torch_npu: events, read by their raw handles.

`Event.elapsed_time()` and `Event.recorded_time()` first drain the host's task queue and synchronise both events,
with the GIL held, even for events that are done. So a finished pair is read from the ACL library itself.
"""

from __future__ import annotations

import ctypes
import functools
import operator
from typing import TYPE_CHECKING, Any, Final

from otel_npu.devices.ping import Ping, ping
from otel_npu.native import native

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from otel_npu.devices.device import Pair, Pool

# Event ids a device: 65536 on A2/A3, 1023 on 310P; a record may block when they run out, so stay far below.
_POOL_PAIRS: Final = 1024
_POOL_PAIRS_310: Final = 64

_EVENT_WITH_TIME: Final = 0x08  # ACL_EVENT_TIME_LINE
_EVENT_COMPLETE: Final = 1  # ACL_EVENT_RECORDED_STATUS_COMPLETE
_NOT_SUPPORTED: Final = 207000  # ACL_ERROR_RT_FEATURE_NOT_SUPPORT
_CAPTURE_ACTIVE: Final = 1  # ACL_MODEL_RI_CAPTURE_STATUS_ACTIVE


class Npu:
    """`Device` on torch_npu."""

    kind = "npu"
    host_clock = False
    # aclrtEventGetTimestamp divides the device's ticks down to whole microseconds.
    resolution_ns = 1000

    def __init__(self, torch: Any, torch_npu: Any, acl: ctypes.CDLL | None) -> None:
        self._torch = torch
        self.pools: dict[int, Pool] = {}
        self._acl = acl
        self._new_event: Callable[[int], Any]
        self._asked: dict[int, bool] = {}
        self.current_stream: Callable[[], Any]
        if hasattr(torch, "accelerator"):
            self._new_event = self._new_generic_event
            self.current_stream = functools.partial(torch._C._accelerator_getStream, -1)  # -1 is the current device
            self._handle = operator.attrgetter("event_id")
        else:
            # Before torch_npu 2.6, which goes with torch 2.6, generic events carry no timing. torch_npu's own want
            # a stream of its own: they take anything for one, and without one look it up in 11 us and more.
            self._new_event = self._new_npu_event
            self.current_stream = torch.npu.current_stream
            self._handle = operator.attrgetter("npu_event")
        # The raw stream takes 0.08 us, without a stream object being made; the "no wait" is not to drain the task
        # queue. Where torch_npu doesn't have it yet there are the stream's ids, in 0.13 us.
        current_stream_key = getattr(torch_npu._C, "_npu_getCurrentRawStreamNoWait", torch_npu._C._npu_getCurrentStream)
        self.current_stream_key: Callable[[], Any] = functools.partial(current_stream_key, -1)
        self.capturing = torch.npu.is_current_stream_capturing
        self._pingers: dict[int, _Pinger] = {}
        self.pool_pairs = _POOL_PAIRS_310 if "310" in self.name(0) else _POOL_PAIRS
        if acl is not None:
            acl.aclrtEventGetTimestamp.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
            acl.aclrtEventElapsedTime.argtypes = [ctypes.c_void_p] * 3
            self._addresses = [
                ctypes.cast(call, ctypes.c_void_p).value
                for call in (acl.aclrtEventElapsedTime, acl.aclrtEventGetTimestamp)
            ]

    @classmethod
    def open(cls) -> Npu:
        """The NPUs of this process, which has initialised them."""
        import torch
        import torch_npu

        try:
            # Loaded long since by torch_npu; opened by soname it is the same one. Held under the GIL: the calls
            # take less time than giving it away does.
            acl = ctypes.PyDLL("libascendcl.so")
            acl.aclrtEventGetTimestamp, acl.aclrtEventElapsedTime  # noqa: B018
        except (OSError, AttributeError):
            acl = None
        return cls(torch, torch_npu, acl)

    def new_event(self, device_index: int) -> Any:
        """An event, or None where the device makes none that carry the time."""
        return self._new_event(device_index) if self._makes_events(device_index) else None

    def _makes_events(self, device_index: int) -> bool:
        """Whether it does: ACL is asked once, the calling thread's device being the one.

        If it doesn't, torch_npu only warns, and with the task queue on it enqueues the event that isn't there: that
        record fails behind the model's back, and nothing of the model's runs any more. All other errors it raises.
        """
        acl, makes = self._acl, self._asked.get(device_index)
        create = getattr(acl, "aclrtCreateEventExWithFlag", None)
        if makes is not None or acl is None or create is None:
            return makes is not False
        event = ctypes.c_void_p()
        error = create(ctypes.byref(event), ctypes.c_uint32(_EVENT_WITH_TIME))
        if not error:
            acl.aclrtDestroyEvent(event)
        if error in (0, _NOT_SUPPORTED):
            self._asked[device_index] = not error
        return bool(error != _NOT_SUPPORTED)

    def _new_generic_event(self, device_index: int) -> Any:
        """The ACL event behind it is made at its first record.

        Of the class itself: in a worker vllm-ascend 0.13 - 0.18 puts `torch.npu.Event` in place of `torch.Event`, and
        vLLM's CPU runner a placeholder.
        """
        return self._torch._C.Event(device=f"npu:{device_index}", enable_timing=True)

    def _new_npu_event(self, _device_index: int) -> Any:
        """As its first record makes the ACL event, so it makes it the event of that stream's device."""
        return self._torch.npu.Event(enable_timing=True)

    def made(self, event: Any) -> bool:
        """Whether it has a handle."""
        return bool(self._handle(event))

    def adopt_thread(self, device_index: int) -> None:
        """Set the device: a thread that never did would open a stray context on device 0."""
        self._torch.npu.set_device(device_index)

    def ping(self, device_index: int, budget_ns: int) -> Ping | None:
        """The device's clock, from an event on a stream of our own.

        It goes past torch_npu altogether: on any torch stream it would wait in the host's task queue behind the
        model's work, and could be handed the error of a launch of the model's, which is for the model alone.
        """
        if self._acl is None:
            return None
        pinger = self._pingers.get(device_index)
        if pinger is None:
            pinger = self._pingers[device_index] = _Pinger()
        pinger.prepare()
        return ping(pinger.record, pinger.done, pinger.read, budget_ns)

    def captured(self, stream_key: Any) -> bool:
        """Whether the stream, or the one that torch captures on by default, is being captured.

        Called by one thread, whose current stream it changes. False where ACL can't tell.
        """
        default = getattr(getattr(self._torch.npu, "graph", None), "default_capture_stream", None)
        if default is not None:
            # Asking a stream for its raw handle drains the task queue; asking about one's current stream doesn't.
            self._torch.npu.set_stream(default)
            if self.capturing():
                return True
        if isinstance(stream_key, tuple):
            stream_id, device_index, device_type = stream_key
            self._torch.npu.set_stream(
                self._torch.npu.Stream(stream_id=stream_id, device_index=device_index, device_type=device_type)
            )
            return bool(self.capturing())
        get_info = getattr(self._acl, "aclmdlRICaptureGetInfo", None)
        if get_info is None:
            return False
        status, graph = ctypes.c_int(), ctypes.c_void_p()
        error: int = get_info(ctypes.c_void_p(stream_key), ctypes.byref(status), ctypes.byref(graph))
        return error == 0 and status.value == _CAPTURE_ACTIVE

    def name(self, device_index: int) -> str:
        """The chip, such as Ascend910B3."""
        return str(self._torch.npu.get_device_name(device_index))

    def read(self, _device_index: int, pairs: Sequence[Pair]) -> list[tuple[int, int]]:
        """Start and duration of each pair, in nanoseconds since the device's start.

        One timestamp (whole microseconds) places the step; within it everything is measured by elapsed times
        (device ticks, 20 ns on 910B), so that the stages of a step lie exactly as they ran.

        Raises:
            OSError: The ACL library is out of reach, or it reports an error for one of the events.
        """
        if self._acl is None:
            raise OSError("libascendcl.so can't be opened, so event times can't be read")
        if native is not None:
            times: list[tuple[int, int]] = native.read_events(*self._addresses, list(pairs), self._handles)
            return times
        return self._read(pairs)

    def _handles(self, pair: Pair) -> tuple[int, int]:
        """The raw handles of both events, which exist by now."""
        pair.handles = handles = (int(self._handle(pair.start)), int(self._handle(pair.end)))
        return handles

    def _read(self, pairs: Sequence[Pair]) -> list[tuple[int, int]]:
        """`read` in Python."""
        assert self._acl is not None
        elapsed = self._acl.aclrtEventElapsedTime
        # Of this call alone: several threads may read at once.
        timestamp, until_start, length = ctypes.c_uint64(), ctypes.c_float(), ctypes.c_float()
        until_start_pointer, length_pointer = ctypes.addressof(until_start), ctypes.addressof(length)
        times: list[tuple[int, int]] = []
        anchor = anchor_ns = 0
        for pair in pairs:
            start, end = pair.handles or self._handles(pair)
            if not anchor:
                anchor = start
                error = self._acl.aclrtEventGetTimestamp(anchor, ctypes.addressof(timestamp))
                if error:
                    raise OSError(error, "aclrtEventGetTimestamp failed")
                anchor_ns = timestamp.value * 1000
            error = elapsed(until_start_pointer, anchor, start) or elapsed(length_pointer, start, end)
            if error:
                raise OSError(error, "aclrtEventElapsedTime failed")
            times.append((anchor_ns + round(until_start.value * 1e6), round(length.value * 1e6)))
        return times


class _Pinger:
    """A stream and an event of ACL's own, on the calling thread's device. They live as long as the process.

    Raises:
        OSError: ACL reports an error.
    """

    def __init__(self) -> None:
        self._acl = ctypes.CDLL("libascendcl.so")  # gives the GIL away: a record may take its time
        self._stream = ctypes.c_void_p()
        self._event = ctypes.c_void_p()

    def prepare(self) -> None:
        """Make what is not there yet; once made it is kept, also when the other can't be made."""
        if not self._stream:
            self._call("aclrtCreateStream", ctypes.byref(self._stream))
        if not self._event:
            self._call("aclrtCreateEventExWithFlag", ctypes.byref(self._event), ctypes.c_uint32(_EVENT_WITH_TIME))

    def record(self) -> None:
        self._call("aclrtRecordEvent", self._event, self._stream)

    def done(self) -> bool:
        status = ctypes.c_int()
        self._call("aclrtQueryEventStatus", self._event, ctypes.byref(status))
        return status.value == _EVENT_COMPLETE

    def read(self) -> int:
        microseconds = ctypes.c_uint64()
        self._call("aclrtEventGetTimestamp", self._event, ctypes.byref(microseconds))
        return microseconds.value * 1000

    def _call(self, name: str, *arguments: Any) -> None:
        error = getattr(self._acl, name)(*arguments)
        if error:
            raise OSError(error, f"{name} failed")
