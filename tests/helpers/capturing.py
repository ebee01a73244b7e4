"""Tracing on a simulated NPU whose time is a test's own, seen as frames or as exported spans."""

from __future__ import annotations

import contextlib
import math
import socket
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from unittest import mock

import otel_npu
from otel_npu.capture import switch
from otel_npu.capture.link import RelayLink
from otel_npu.devices.simulated import SimulatedNpu
from otel_npu.relay.placing import nest
from otel_npu.settings import Settings
from otel_npu.wire import frames

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from otel_npu.capture.recorder import Recorder
    from tests.helpers.receiver import Receiver, Span

SECOND = 1_000_000_000
MILLISECOND = 1_000_000


class Clock:
    """The host's monotonic clock as the device sees it: it moves when a test says so."""

    def __init__(self) -> None:
        self.ns = 1000 * SECOND

    def __call__(self) -> int:
        return self.ns


def simulated(clock: Clock) -> SimulatedNpu:
    """A device whose every duration is exact: no drift, and an offset in whole ticks."""
    return SimulatedNpu(clock, offset_ns=SECOND, drift_ppm=0)


@dataclass
class Tracing:
    """Tracing that is on, and the device it is on."""

    device: SimulatedNpu
    clock: Clock

    @property
    def recorder(self) -> Recorder:
        recorder = switch.current_recorder()
        assert recorder is not None, "tracing is off"
        return recorder

    def finish(self, *, lost: bool = False) -> None:
        """The device finishes all that was launched, and the relay gets all that was captured and not lost."""
        self.clock.ns += 3600 * SECOND
        assert otel_npu.flush(120) is not lost

    def stage(self, name: str, duration_ns: int = MILLISECOND, /, **attributes: Any) -> None:
        """A stage with one kernel of this length."""
        with otel_npu.stage(name, **attributes):
            self.device.launch(duration_ns)


@dataclass
class Captured(Tracing):
    """Tracing whose frames a test looks at."""

    sent: list[frames.Frame] = field(default_factory=list)
    relay: socket.socket | None = None
    """The other end of the connection."""

    def steps(self, *, lost: bool = False) -> list[frames.Step]:
        """The steps captured so far."""
        self.finish(lost=lost)
        return [frame for frame in self.sent if isinstance(frame, frames.Step)]

    def step(self) -> frames.Step:
        """The only step captured so far."""
        (step,) = self.steps()
        return step

    def said(self, step: frames.Step) -> frames.Attributes:
        """What is said of a step, with what is true of all of its rank."""
        hello = [frame for frame in self.sent if isinstance(frame, frames.Hello)][-1]
        return {**hello.places.get(step.rank, {}), **(step.attributes or {})}

    def unfinished(self) -> list[frames.Unfinished]:
        """The stages reported as unfinished so far."""
        return [frame for frame in list(self.sent) if isinstance(frame, frames.Unfinished)]

    def dropped(self) -> dict[str, int]:
        """What was left out so far, by reason."""
        counts: Counter[str] = Counter()
        for step in self.steps():
            counts.update(step.dropped)
        counts.update(self.recorder.drops.take_unsent())
        return dict(counts)


@dataclass
class Exported(Tracing):
    """Tracing whose spans a test looks at."""

    receiver: Receiver

    def spans(self) -> dict[str, Span]:
        """The spans exported so far, by name, each of which there is once."""
        self.finish()
        spans = {span.name: span for span in self.receiver.spans}
        assert len(spans) == len(self.receiver.spans)
        return spans


@contextlib.contextmanager
def capturing(device: Any = None, **settings: Any) -> Iterator[Captured]:
    """Tracing, with a reader of frames in the relay's place."""
    clock = Clock()
    captured = Captured(device or simulated(clock), clock)
    if device is not None and isinstance(getattr(device, "now", None), Clock):
        captured.clock = device.now

    def attach(_: RelayLink) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        captured.relay = theirs
        threading.Thread(target=_read, args=(theirs, captured.sent), daemon=True).start()
        return ours

    with mock.patch.object(RelayLink, "_start_thread", attach):
        switch.enable_on(captured.device, chosen(**settings))
        try:
            yield captured
        finally:
            captured.clock.ns += 3600 * SECOND
            otel_npu.disable()


def chosen(**settings: Any) -> Settings:
    """Every step is kept, in this process, unless the test says otherwise."""
    return Settings(**{"export": "inprocess", "steps_per_second": math.inf, **settings})


def wait_until(condition: Callable[[], object], timeout_seconds: float = 120.0) -> None:
    """Return once the condition holds.

    Raises:
        AssertionError: It does not, in time.
    """
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline, "what was waited for has not happened"
        time.sleep(0.001)


def _read(connection: socket.socket, sent: list[frames.Frame]) -> None:
    with connection:
        while packet := connection.recv(frames.MAX_FRAME_BYTES):
            for frame in map(frames.decode_frame, frames.frames_in(packet)):
                if isinstance(frame, frames.Flush):
                    connection.send(frames.encode(frames.Flushed(frame.number, complete=True)))
                else:
                    if isinstance(frame, frames.Step):
                        nest(frame.stages)
                    sent.append(frame)
