"""The whole way from a stage to its span on a clock of the harness's own, with the truth beside each span.

Stages, recorder, resolver, frames, assembler and both its clocks are the real ones. What is simulated is the host's
time, the wall clock, and an NPU that reads its clock as coarsely and answers as late as a real one.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import random
from collections import deque
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, cast
from unittest import mock

import otel_npu
from otel_npu import semconv
from otel_npu.capture import context, plain, resolver, switch
from otel_npu.capture import idle as idle_thread
from otel_npu.capture.idle import IDLE_SECONDS, WATCH_SECONDS
from otel_npu.capture.link import RelayLink
from otel_npu.capture.recorder import Recorder
from otel_npu.devices.simulated import SimulatedEvent, SimulatedNpu, SimulatedStream
from otel_npu.native import native
from otel_npu.relay.assembler import Assembler
from otel_npu.relay.spans import span_limits
from otel_npu.relay.wall import WallClock
from otel_npu.settings import Settings
from otel_npu.wire import frames

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from opentelemetry.sdk.trace import ReadableSpan

    from otel_npu.devices.device import Pair
    from otel_npu.wire.channel import Channel

S, MS, US = 1_000_000_000, 1_000_000, 1_000
DAY: Final = 86_400 * S
HOST_START_NS: Final = 10 * DAY
UNIX_START_NS: Final = 1_700_000_000 * S
TICK_NS: Final = 20  # of the device's clock

Latency = Literal["symmetric", "before", "after"]
# From a record to its event, and from there to the host's seeing it done. Nobody can tell a latency before the event
# from one after it, so half of the least one-sided latency is error for good; the calls themselves add 2 us to it.
_LATENCIES: Final[dict[Latency, tuple[tuple[int, int], tuple[int, int]]]] = {
    "symmetric": ((10 * US, 30 * US), (10 * US, 30 * US)),
    "before": ((10 * US, 60 * US), (0, 2 * US)),
    "after": ((0, 2 * US), (10 * US, 60 * US)),
}


class HostClock:
    """The host's monotonic clock: time passes when it is read, and when the harness says so."""

    def __init__(self) -> None:
        self.ns = HOST_START_NS

    def __call__(self) -> int:
        self.ns += 150
        return self.ns


class Wall(NamedTuple):
    """A wall clock which a minute after the start is stepped, or slewed for a minute."""

    step_ns: int = 0
    ppm: int = 0

    def __call__(self, ns: int) -> int:
        """Unix time, so many ns after the start."""
        slewed_ns = min(max(ns - 60 * S, 0), 60 * S) * self.ppm // 1_000_000
        return UNIX_START_NS + ns + slewed_ns + (self.step_ns if ns >= 60 * S else 0)


@dataclass(frozen=True)
class Scenario:
    """What a run is like. `Npu` and `Engine` say what becomes of it.

    Attributes:
        seconds: How long it takes, on the device.
        ppm: How much faster the device's clock runs.
        offset_ns: Device time minus host time at the start.
        pings: Whether the device answers pings.
        failing: Which share of them it answers too late.
        latency: Where the time goes between the host's record and its seeing it done: before the device gets to it,
            after, or both.
        backlog_ns: For how long, at most, the host's task queue holds up a step; 200 tasks and more are in it.
        resets: When the device's clock starts again near zero, in seconds from the start.
        wall: The wall clock.
        kept: Steps a second that become traces. All of them give bounds.
        forward_ms: How long the longest stage takes, about.
        nested: Whether each step ends with a step inside it.
    """

    seconds: int = 1800
    ppm: float = 0.0
    offset_ns: int = 123_456_789_000
    pings: bool = True
    failing: float = 0.0
    latency: Latency = "symmetric"
    backlog_ns: int = 50 * MS
    resets: tuple[float, ...] = ()
    wall: Wall = Wall()  # noqa: RUF009 - it never changes
    kept: float = 3.0
    forward_ms: int = 55
    nested: bool = False
    seed: int = 1


class Truth(NamedTuple):
    """Where a stage really was, in ns of the host's monotonic clock."""

    start_ns: int
    end_ns: int


class Event(SimulatedEvent):
    """Reached when the device has got to it, which takes it a while; seen some time after that."""

    __slots__ = ("_device", "_seen_from_ns")

    def __init__(self, device: Npu) -> None:
        super().__init__(device.now)
        self._device = device
        self._seen_from_ns = 0

    def record(self, stream: SimulatedStream) -> None:
        self.reached_ns = self._device.enqueue(stream)
        self._seen_from_ns = self.reached_ns + self._device.answers_late()

    def query(self) -> bool:
        return self._now() >= self._seen_from_ns


class Npu(SimulatedNpu):
    """A device behind the host's task queue, with latencies, whose clock is read as an NPU's is."""

    resolution_ns = 1000

    def __init__(self, clock: HostClock, scenario: Scenario) -> None:
        super().__init__(clock, offset_ns=scenario.offset_ns, drift_ppm=scenario.ppm)
        self._clock = clock
        self._scenario = scenario
        self._rng = random.Random(scenario.seed)
        self._dispatched_ns = 0
        self._started = [(clock.ns, clock.ns + scenario.offset_ns)]
        self._started += [(clock.ns + round(at * S), 5 * MS) for at in scenario.resets]
        self._before, self._after = _LATENCIES[scenario.latency]
        self.busy = 0

    def launch(self, duration_ns: int) -> None:
        self.enqueue(self.current_stream(), duration_ns)

    def hold_up(self, tasks: int, ns: int) -> None:
        """So many tasks get in line in the host's queue, and the last leaves it so much later."""
        self._dispatched_ns = max(self._dispatched_ns, self._clock.ns) + ns
        self.busy += tasks

    def enqueue(self, stream: SimulatedStream, duration_ns: int = 0) -> int:
        """Dispatch a task in its turn; when it ends on the device."""
        self._clock.ns += _between(self._rng, 500, 3 * US)
        if self._rng.random() < 0.002:  # somebody else has the core for a while
            self._clock.ns += _between(self._rng, 0, 3 * MS)
        dispatched_ns = self._clock.ns
        if stream is not self._ping_stream:
            dispatched_ns = self._dispatched_ns = max(self._dispatched_ns + 200, dispatched_ns)
        stream.busy_until_ns = max(stream.busy_until_ns, dispatched_ns + self._starts_late(stream)) + duration_ns
        return stream.busy_until_ns

    def _starts_late(self, stream: SimulatedStream) -> int:
        if stream is self._ping_stream and (not self._scenario.pings or self._rng.random() < self._scenario.failing):
            return _between(self._rng, 200 * US, 10 * MS)
        return _between(self._rng, *self._before)

    def answers_late(self) -> int:
        """From an event's end to the host's seeing it."""
        return _between(self._rng, *self._after)

    def new_event(self, _device_index: int) -> Event:
        return Event(self)

    def device_time(self, host_ns: int) -> int:
        since_ns, shown_ns = next(start for start in reversed(self._started) if start[0] <= host_ns or start[1] > S)
        elapsed_ns = host_ns - since_ns
        ns = shown_ns + elapsed_ns + round(elapsed_ns * self._drift)
        return ns - ns % TICK_NS

    def ping(self, device_index: int, budget_ns: int) -> Any:
        found = super().ping(device_index, budget_ns)
        return found and found._replace(device_ns=found.device_ns // US * US)

    def read(self, _device_index: int, pairs: Sequence[Pair]) -> list[tuple[int, int]]:
        """As `Npu.read` of torch_npu: one whole microsecond for the step, elapsed milliseconds in float32 in it."""
        first_ns = self.device_time(pairs[0].start.reached_ns)
        times = []
        for pair in pairs:
            start_ns, end_ns = self.device_time(pair.start.reached_ns), self.device_time(pair.end.reached_ns)
            until_ns, length_ns = _as_float32(start_ns - first_ns), _as_float32(end_ns - start_ns)
            times.append((first_ns // US * US + until_ns, length_ns))
        return times


def _between(rng: random.Random, least: int, most: int) -> int:
    return int(least + rng.random() * (most - least))


def _as_float32(ns: int) -> int:
    return round(ctypes.c_float(ns / 1e6).value * 1e6)


class Worker(Recorder):
    """A recorder without a thread: what its idle thread does is done when the harness says so."""

    def __init__(self, *given: Any, **settings: Any) -> None:
        with mock.patch.object(RelayLink, "keep"):  # its frames go where the harness says
            super().__init__(*given, **settings)

    def _begin(self) -> None:
        pass

    def tick(self, number: int) -> None:
        """What the idle thread does at each look, and about once a second."""
        self.idle.resolve()
        if number % round(WATCH_SECONDS / IDLE_SECONDS) == 0:
            self.idle.ping()


class Placed(NamedTuple):
    """One stage's span, on the monotonic clock, and the truth about it."""

    start_ns: int
    end_ns: int
    uncertainty_ns: int | None
    true: Truth
    step: int

    @property
    def error_ns(self) -> int:
        return max(abs(self.start_ns - self.true.start_ns), abs(self.end_ns - self.true.end_ns))

    @property
    def covered(self) -> bool:
        return self.uncertainty_ns is not None and self.error_ns <= self.uncertainty_ns


class Figures(NamedTuple):
    """What a run shows, in microseconds."""

    spans: int
    median_error: float
    p99_error: float
    max_error: float
    median_uncertainty: float
    within: float
    """The share of spans with both ends within the stated uncertainty."""


@dataclass
class Run:
    """What came out of a run.

    Attributes:
        placed: Every stage span, in order.
        steps: Every span of a step, and of the stages in it, with ns of the wall clock.
        broken: Where a span breaks causality, in words.
        dropped: Drop counts.
    """

    placed: list[Placed] = field(default_factory=list)
    steps: dict[int, Sequence[ReadableSpan]] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)
    pings: int = 0
    resolved: int = 0
    tasks: int = 0

    def figures(self, since_s: float = 0, before_s: float = float("inf")) -> Figures:
        """Sum up, without the first seconds, in which there may be no map yet."""
        chosen = [
            placed
            for placed in self.placed
            if since_s * S <= placed.true.start_ns - HOST_START_NS and placed.true.end_ns - HOST_START_NS < before_s * S
        ]
        ends = [
            abs(error_ns) / US
            for placed in chosen
            for error_ns in (placed.start_ns - placed.true.start_ns, placed.end_ns - placed.true.end_ns)
        ]
        return Figures(
            len(chosen),
            median(ends),
            quantiles(ends, n=100)[98],
            max(ends),
            median((placed.uncertainty_ns or 0) / US for placed in chosen),
            sum(placed.covered for placed in chosen) / len(chosen),
        )


class RememberingWallClock(WallClock):
    """Remembers what it has said last."""

    said_ns = 0

    def offset_ns(self) -> int:
        self.said_ns = super().offset_ns()
        return self.said_ns


@contextlib.contextmanager
def stage_clock(clock: Callable[[], int]) -> Iterator[None]:
    """What tells stages the host's time, be they in Python or in the extension module."""
    with mock.patch.object(plain, "perf_counter_ns", clock):
        if native is not None:
            native.use_clock(clock)
        try:
            yield
        finally:
            if native is not None:
                native.use_clock(None)


def decoded(packet: bytes) -> list[frames.Frame]:
    """The frames in a packet."""
    return list(map(frames.decode_frame, frames.frames_in(packet)))


def deliver(channel: Channel, take: Callable[[bytes], None]) -> None:
    """Let a channel's frames come here, instead of into a socket: hello first, then each as it is sent."""

    def transmit(frame: bytes) -> bool:
        if not channel._greeted:
            channel._greeted = True
            take(frames.encode(channel._hello()))
        take(frame)
        return True

    setattr(channel, "_transmit", transmit)  # noqa: B010
    channel.drain()


class Relay:
    """The relay's end of the socket, in place of the server: frames in, spans out."""

    def __init__(self, wall: RememberingWallClock, truths: dict[int, list[Truth]], run: Run) -> None:
        self._wall = wall
        self._truths = truths
        self._run = run
        self.assembler: Assembler

    def take(self, packet: bytes) -> None:
        """A frame has come."""
        for frame in decoded(packet):
            self._handle(frame)

    def _handle(self, frame: frames.Frame) -> None:
        if isinstance(frame, frames.Hello):
            self.assembler = Assembler(frame, self._wall, span_limits)
        elif isinstance(frame, frames.Ping):
            self._run.pings += 1
            self.assembler.timeline.ping(frame)
        elif isinstance(frame, frames.Step):
            for reason, count in frame.dropped.items():
                self._run.dropped[reason] = self._run.dropped.get(reason, 0) + count
            self._run.resolved += 1
            spans, truths = self.assembler.step(frame), self._truths.pop(frame.number)
            if spans:
                self._keep(frame, spans, truths)

    def _keep(self, step: frames.Step, spans: Sequence[ReadableSpan], truths: list[Truth]) -> None:
        *of_stages, _ = spans
        unix_ns = self._wall.said_ns
        self._run.steps[step.number] = spans
        self._run.broken += [f"step {step.number}: {fault}" for fault in _faults(step, spans, unix_ns)]
        for stage, span, true in zip(step.stages, of_stages, truths, strict=True):
            if stage.device_ns is not None:
                uncertainty = (span.attributes or {}).get(semconv.CLOCK_UNCERTAINTY)
                self._run.placed.append(
                    Placed(
                        _time(span.start_time) - unix_ns,
                        _time(span.end_time) - unix_ns,
                        None if uncertainty is None else round(cast("float", uncertainty) * 1e9),
                        true,
                        step.number,
                    )
                )


def _time(ns: int | None) -> int:
    assert ns is not None
    return ns


def _faults(step: frames.Step, spans: Sequence[ReadableSpan], unix_ns: int) -> Iterator[str]:
    """What of a step's spans cannot have been."""
    times = [(_time(span.start_time) - unix_ns, _time(span.end_time) - unix_ns) for span in spans]
    step_start_ns, step_end_ns = times[-1]
    for stage, (start_ns, end_ns) in zip(step.stages, times[:-1], strict=True):
        around_start_ns, around_end_ns = times[stage.parent] if stage.parent >= 0 else (step_start_ns, step_end_ns)
        if start_ns < stage.entered_ns:
            yield f"{stage.name} starts {stage.entered_ns - start_ns} ns before it was enqueued"
        if end_ns < stage.exited_ns and stage.parent < 0:
            yield f"{stage.name} ends {stage.exited_ns - end_ns} ns before its end was enqueued"
        if end_ns < start_ns:
            yield f"{stage.name} takes {end_ns - start_ns} ns"
        # A stage whose own times could not be read lies where the host was in it, and what is in it where it ran.
        timed_alike = stage.parent < 0 or (step.stages[stage.parent].device_ns is None) == (stage.device_ns is None)
        if timed_alike and not around_start_ns <= start_ns <= end_ns <= around_end_ns:
            yield f"{stage.name} is not within what is around it"
        if not step_start_ns <= start_ns <= end_ns <= step_end_ns:
            yield f"{stage.name} is not within its step"


class Engine:
    """Serves: steps of 60 to 110 ms on the device, enqueued up to two ahead, and idle once a second."""

    def __init__(self, scenario: Scenario) -> None:
        self.clock = HostClock()
        self.device = Npu(self.clock, scenario)
        self.run = Run()
        self._scenario = scenario
        self._rng = random.Random(scenario.seed + 1)
        self._truths: dict[int, list[Truth]] = {}
        self._ticks = itertools.count()
        self._next_tick_ns = self.clock.ns
        self._ahead: deque[int] = deque()
        wall = RememberingWallClock(self.clock, lambda: scenario.wall(self.clock() - HOST_START_NS))
        settings = Settings(export="inprocess", steps_per_second=scenario.kept)
        self.worker = Worker(settings, self.device)
        self.worker.limiter = context.Limiter(scenario.kept, self.clock)
        self.relay = Relay(wall, self._truths, self.run)
        deliver(self.worker.channel, self.relay.take)

    def serve(self) -> Run:
        """Run the scenario."""
        next_idle_ns = self.clock.ns
        end_ns = self.clock.ns + self._scenario.seconds * S
        with (
            stage_clock(self.clock),
            mock.patch.object(idle_thread, "perf_counter_ns", self.clock),
            mock.patch.object(resolver, "perf_counter_ns", self.clock),
            mock.patch.object(switch, "_recorder", self.worker),
        ):
            while self.clock.ns < end_ns:
                idle = self.clock.ns >= next_idle_ns
                if idle:
                    next_idle_ns = self.clock.ns + S
                self.step(idle=idle)
            self.wait_until(self.clock.ns + 20 * S)
        self.run.tasks = self.device.busy
        for reason, count in self.worker.drops.take_unsent().items():
            self.run.dropped[reason] = self.run.dropped.get(reason, 0) + count
        return self.run

    def step(self, *, idle: bool) -> None:
        """One step; an idle one finds the device idle, and waits for its result before it closes."""
        rng, device, stream = self._rng, self.device, self.device.default_stream
        while self._ahead and (idle or len(self._ahead) > 1):
            self.wait_until(self._ahead.popleft())
        if idle:
            self.wait_until(max(self.clock.ns, device._dispatched_ns) + _between(rng, 100 * US, 2 * MS))
        step = otel_npu.step("decode").open()
        with otel_npu.stage("prepare_input"):
            device.launch(_between(rng, MS, 5 * MS))
        with otel_npu.stage("forward"):
            if not idle and self._scenario.backlog_ns:
                device.hold_up(_between(rng, 200, 400), _between(rng, 0, self._scenario.backlog_ns))
            with otel_npu.stage("attention"):
                device.launch(_between(rng, 10 * MS, 30 * MS))
            device.launch(round(rng.uniform(0.75, 1.25) * self._scenario.forward_ms * MS))
        with otel_npu.stage("sample"):
            device.launch(_between(rng, MS, 5 * MS))
        if self._scenario.nested:
            inner = otel_npu.step("draft").open()
            with otel_npu.stage("draft"):
                device.launch(_between(rng, MS, 5 * MS))
            self._close(inner)
        if idle:
            self.wait_until(stream.busy_until_ns + device.answers_late())
        else:
            self._ahead.append(stream.busy_until_ns)
        self._close(step)
        self.wait_until(self.clock.ns)

    def _close(self, step: Any) -> None:
        """Close a step, and keep the truth about it."""
        used = [cast("Pair", stage.pair) for stage in step.step.stages]
        self._truths[step.step.number] = [Truth(pair.start.reached_ns, pair.end.reached_ns) for pair in used]
        step.close()

    def wait_until(self, host_ns: int) -> None:
        """Let time pass, and the idle thread work."""
        while self._next_tick_ns <= host_ns:
            self.clock.ns = max(self.clock.ns, self._next_tick_ns)
            self.worker.tick(next(self._ticks))
            self._next_tick_ns = max(self.clock.ns, self._next_tick_ns) + round(IDLE_SECONDS * S)
        self.clock.ns = max(self.clock.ns, host_ns)


def serve(scenario: Scenario) -> Run:
    """Run a scenario; what came of it."""
    return Engine(scenario).serve()
