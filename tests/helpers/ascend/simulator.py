"""The controls of the simulated Ascend device.

    simulator = Simulator.load()  # before torch is imported, or torch finds no Ascend runtime
    import torch

    torch.npu.set_device(0)
    simulator.launch(torch.npu.current_stream().npu_stream, microseconds=250)

Reading `npu_stream` drains torch_npu's task queue, so a kernel launched this way comes after everything
that Python has enqueued before. `torch.npu._sleep(n)` sends a kernel of exactly n ns through the task queue.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, get_args

from .build import DEFAULT_CACHE, build, library_names

if TYPE_CHECKING:
    from pathlib import Path

Fault = Literal["record", "query", "timestamp", "elapsed", "create", "synchronize", "launch"]
Counter = Literal[
    "create",
    "destroy",
    "record",
    "query",
    "elapsed",
    "timestamp",
    "synchronize_event",
    "synchronize_stream",
    "synchronize_device",
    "synchronize",
    "set_device",
    "launch",
    "live_events",
]
COUNTERS: tuple[Counter, ...] = get_args(Counter)


class Executed(NamedTuple):
    """One record of an event that the device has executed."""

    event_handle: int
    device: int
    stream_id: int
    device_ns: int
    """When, in ns of the device's clock, not cut to its ticks."""
    host_ns: int
    """When, in ns of the host's timeline (`Simulator.now_ns`)."""


class _Executed(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in Executed._fields]


class Simulator:
    """The one simulated runtime of this process. Get it from `Simulator.load()`."""

    _instance: ClassVar[Simulator | None] = None
    _loading: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, folder: Path) -> None:
        # By path and globally: torch_npu finds them by soname, and LD_LIBRARY_PATH isn't needed.
        libraries = {name: ctypes.CDLL(str(folder / name), ctypes.RTLD_GLOBAL) for name in library_names(folder)}
        self._c = libraries["libascendcl.so"]
        self._held: set[int] = set()
        self._capacity = 0
        pointer, integer, ns, text = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_char_p
        for name, result, arguments in (
            ("launch", integer, (pointer, ns)),
            ("hold", pointer, (pointer,)),
            ("release", None, (pointer,)),
            ("manual_clock", None, (integer,)),
            ("advance", None, (ns,)),
            ("now_ns", ns, ()),
            ("device_count", integer, ()),
            ("device_ns", ns, (integer,)),
            ("set_clock", None, (integer, ns, ctypes.c_double)),
            ("default_clock", None, (integer,)),
            ("reset_device", None, (integer,)),
            ("configure", integer, (text, ns)),
            ("defaults", None, ()),
            ("fail", integer, (text, integer, integer)),
            ("count", ns, (text,)),
            ("truth_start", None, (ns,)),
            ("truth_stop", None, ()),
            ("truth", ns, (pointer,)),
        ):
            function = getattr(self._c, f"sim_{name}")
            function.restype, function.argtypes = result, arguments

    @classmethod
    def load(cls, cache_dir: Path = DEFAULT_CACHE) -> Simulator:
        """Build the runtime if needed and load it into this process, once.

        Raises:
            BuildError: it can't be built here.
            RuntimeError: torch_npu has been imported before, with another runtime.
        """
        with cls._loading:
            if cls._instance is None:
                if "torch_npu" in sys.modules:
                    raise RuntimeError("Simulator.load() must come before torch_npu (or torch) is imported")
                cls._instance = cls(build(cache_dir))
            return cls._instance

    # Work

    def launch(self, stream_pointer: int, microseconds: float) -> None:
        """Put a kernel of this length on a stream, past torch_npu's task queue (`Stream.npu_stream`)."""
        if self._c.sim_launch(stream_pointer, round(microseconds * 1000)):
            raise ValueError(f"{stream_pointer:#x} is not a stream")

    def hold(self, stream_pointer: int) -> int:
        """Put a kernel on a stream that hangs until `release` gets the returned handle."""
        handle: int | None = self._c.sim_hold(stream_pointer)
        if handle is None:
            raise ValueError(f"{stream_pointer:#x} is not a stream")
        self._held.add(handle)
        return handle

    def release(self, handle: int) -> None:
        """Let a hung kernel end now."""
        self._held.remove(handle)
        self._c.sim_release(handle)

    # Time

    def manual_clock(self, on: bool) -> None:
        """Stop the host's timeline where it is (True), or let it be the real monotonic clock again (False).

        Stopped, it moves by `advance`, and by a blocking ACL call, which moves it to what it waits for.
        """
        self._c.sim_manual_clock(on)

    def advance(self, microseconds: float) -> None:
        """Move a stopped clock."""
        self._c.sim_advance(round(microseconds * 1000))

    def now_ns(self) -> int:
        """The host's timeline now, in ns: `time.perf_counter_ns()`, or where the manual clock stands."""
        return int(self._c.sim_now_ns())

    def device_ns(self, device: int) -> int:
        """The device's clock now, in ns. Timestamps of events are this clock's, cut to its ticks."""
        return int(self._c.sim_device_ns(self._checked(device)))

    def set_clock(self, device: int, offset_microseconds: float, drift_ppm: float) -> None:
        """From now on the device's clock is the host's plus the offset, and drifts away from it from there.

        What has completed already keeps its timestamps.
        """
        self._c.sim_set_clock(self._checked(device), round(offset_microseconds * 1000), drift_ppm)

    def reset_device(self, device: int) -> None:
        """Restart the device's clock at zero, as a device reset does. Its streams and events live on."""
        self._c.sim_reset_device(self._checked(device))

    def _checked(self, device: int) -> int:
        if not 0 <= device < self._c.sim_device_count():
            raise ValueError(f"there is no device {device}")
        return device

    # Behaviour

    def configure(self, **settings: int) -> None:
        """Change how long things take, in ns. All are 0 by default, except `tick_ns`.

        - `dispatch_delay_ns`: real time that an `aclrtRecordEvent` call blocks its thread, which is
          torch_npu's dispatch thread where the task queue is on
        - `launch_dispatch_delay_ns`: the same for the launch of `torch.npu._sleep`'s kernel
        - `launch_latency_ns`: from enqueueing any task to the earliest time at which it starts
        - `record_cost_ns`: device time that a record takes
        - `visible_latency_ns`: from the end of a task to the host's seeing it, by a query or a wait
        - `tick_ns`: resolution of the devices' timestamps, 20 by default
        """
        for name, value in settings.items():
            if self._c.sim_configure(name.encode(), value):
                raise TypeError(f"no setting {name!r}")

    def fail(self, call: Fault, error: int, times: int = 1) -> None:
        """Let the next `times` calls of a kind return this ACL error, without any other effect.

        "launch" is that of `torch.npu._sleep`'s kernel, "synchronize" is any of the three synchronizations.
        A call that fails on torch_npu's dispatch thread breaks the task queue for good: do that in a process
        of its own.
        """
        if self._c.sim_fail(call.encode(), error, times):
            raise ValueError(f"no call {call!r}")

    def defaults(self) -> None:
        """Undo what a test has changed: settings, faults, hung kernels, clocks, truth log. Not counters."""
        self._c.sim_defaults()
        for handle in list(self._held):
            self.release(handle)
        self.manual_clock(False)
        for device in range(self._c.sim_device_count()):
            self._c.sim_default_clock(device)
        self.truth_start(0)

    # Observation

    def count(self, call: Counter) -> int:
        """How often a call was made since the process started; "live_events" is how many exist now.

        "synchronize" is the sum of the other three, "launch" counts the kernels of `torch.npu._sleep`.
        """
        count = int(self._c.sim_count(call.encode()))
        if count < 0:
            raise ValueError(f"no counter {call!r}")
        return count

    def counts(self) -> dict[Counter, int]:
        """All counters."""
        return {name: self.count(name) for name in COUNTERS}

    def truth_start(self, capacity: int) -> None:
        """Start an empty log of at most `capacity` records of events, of all devices and streams."""
        self._capacity = capacity
        self._c.sim_truth_start(capacity)

    def truth_stop(self) -> None:
        """Log no more records. What has been logged can still be read."""
        self._c.sim_truth_stop()

    def truth(self) -> list[Executed]:
        """The logged records that the device has executed by now, in the order they were enqueued on it.

        Records made during graph capture are not among them: the device doesn't execute those.

        Raises:
            RuntimeError: there were more records than the log's capacity.
        """
        entries = (_Executed * self._capacity)()
        count = self._c.sim_truth(entries)
        if count < 0:
            raise RuntimeError(f"more than {self._capacity} records")
        return [Executed(*(getattr(entry, name) for name in Executed._fields)) for entry in entries[:count]]
