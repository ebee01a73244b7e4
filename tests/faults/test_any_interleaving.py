"""Whatever a program does, in whatever order, what arrives is whole traces, and what does not arrive is counted.

The threads are real ones, but take turns at single operations in an order that hypothesis chooses.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from concurrent import futures
from typing import TYPE_CHECKING, Any, TypeAlias

import hypothesis
import pytest
from hypothesis import strategies

import otel_npu
from otel_npu.capture import link, switch
from otel_npu.devices.simulated import SimulatedEvent, SimulatedNpu
from tests.faults.effort import IN_FULL, times
from tests.helpers.capturing import SECOND, Clock, chosen
from tests.helpers.receiver import Receiver

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.helpers.receiver import Span

THREADS = 3
STREAMS = 3  # the first is the default one, which can't be captured
ERROR = 2  # OpenTelemetry's status code
LEFT_OUT = ("stream_captured", "step_too_large", "reentered")


Operation: TypeAlias = tuple[str, int, Any]


class ProgramError(Exception):
    """The program's own."""


@pytest.fixture(scope="module")
def outcome() -> Iterator[Callable[..., tuple[Program, list[Span]]]]:
    """Runs operations; gives the program and the spans that arrive of it."""
    with Receiver() as receiver:

        def run_traced(operations: list[Operation], pairs: int) -> tuple[Program, list[Span]]:
            before = len(receiver.spans)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(link, "_RETRY_SECONDS", 0.01)  # after the connection was lost
                for variable, value in receiver.http_environment.items():
                    patch.setenv(variable, value)
                program = run(operations, pairs)
            return program, receiver.spans[before:]

        yield run_traced


threads = strategies.integers(0, THREADS - 1)
OPERATIONS = strategies.one_of(
    strategies.tuples(strategies.just("open"), threads, strategies.sampled_from(["prefill", "decode"])),
    strategies.tuples(strategies.just("enter"), threads, strategies.booleans()),
    strategies.tuples(strategies.just("enter"), threads, strategies.booleans()),
    # Mostly what was entered last, sometimes something around it; with an error or without.
    strategies.tuples(
        strategies.just("leave"),
        threads,
        strategies.tuples(strategies.sampled_from([0, 0, 0, 0, 1, 2]), strategies.booleans()),
    ),
    strategies.tuples(strategies.just("leave"), threads, strategies.just((0, False))),
    strategies.tuples(strategies.just("launch"), threads, strategies.integers(1, 10**9)),
    strategies.tuples(strategies.just("use"), threads, strategies.integers(0, STREAMS - 1)),
    strategies.tuples(strategies.just("capture"), threads, strategies.integers(1, STREAMS - 1)),
    strategies.tuples(strategies.just("wait"), threads, strategies.integers(0, 10 * SECOND)),
    strategies.tuples(strategies.just("fault"), threads, strategies.sampled_from(["read", "query", ""])),
    strategies.tuples(strategies.just("hang_up"), threads, strategies.none()),
)


class Faulty(SimulatedNpu):
    """A device whose events can't be read, or not even asked, for as long as `fault` says so."""

    fault = ""

    def read(self, device_index: int, pairs: Any) -> list[tuple[int, int]]:
        self.fail("read")
        return super().read(device_index, pairs)

    def new_event(self, _device_index: int) -> SimulatedEvent:
        return FaultyEvent(self)

    def fail(self, call: str) -> None:
        if self.fault == call:
            raise OSError(507015, "the device says no")


class FaultyEvent(SimulatedEvent):
    __slots__ = ("_device",)

    def __init__(self, device: Faulty) -> None:
        super().__init__(device.now)
        self._device = device

    def query(self) -> bool:
        self._device.fail("query")
        return super().query()


class Program:
    """Does what it is told, and remembers what it did."""

    def __init__(self, pairs: int) -> None:
        self.clock = Clock()
        self.device = Faulty(self.clock, offset_ns=SECOND, drift_ppm=0)
        self.device.pool_pairs = pairs
        self.steps = 0
        self.failed: dict[str, bool] = {}
        """Of each stage, whether it was left with an error."""
        self.in_order = True
        """Whether each was left before what is around it."""
        self.hung_up = False
        """Whether the connection was lost: two relays have placed its steps, and counts may be in the log alone."""
        self.counted: dict[str, int] = {}
        """What it has counted as left out."""
        self._streams = [self.device.default_stream, *(self.device.new_stream() for _ in range(STREAMS - 1))]
        self._open: dict[int, list[tuple[str, Any]]] = defaultdict(list)
        self._threads = [futures.ThreadPoolExecutor(1) for _ in range(THREADS)]

    def do(self, operation: str, thread: int, what: Any) -> None:
        """One operation on one thread; nothing of ours comes out of it."""
        self._threads[thread].submit(getattr(self, operation), thread, what).result(20)

    def end(self) -> None:
        """Leave all that is open, and let the threads end."""
        self.device.fault = ""
        for thread, there in self._open.items():
            while there:
                self.do("leave", thread, (0, False))
        for pool in self._threads:
            pool.shutdown()

    def open(self, thread: int, kind: str) -> None:
        self._open[thread].append(("", otel_npu.step(kind, thread=thread).open()))
        self.steps += 1

    def enter(self, thread: int, decorated: bool) -> None:
        name = f"stage {len(self.failed)}"
        self.failed[name] = False
        if decorated:  # a whole stage at once
            otel_npu.stage(name)(lambda: self.device.launch(1000))()
            return
        stage = otel_npu.stage(name, thread=thread)
        stage.__enter__()
        self._open[thread].append((name, stage))

    def leave(self, thread: int, what: tuple[int, bool]) -> None:
        back, fails = what
        there = self._open[thread]
        if not there:
            return
        back = min(back, len(there) - 1)
        self.in_order &= not back
        name, left = there.pop(-1 - back)
        error = ProgramError("the model is out of luck") if fails else None
        if not name:
            left.close(type(error) if error else None)
            return
        assert not left.__exit__(type(error) if error else None, error, None)
        self.failed[name] = fails

    def launch(self, _: int, nanoseconds: int) -> None:
        self.device.launch(nanoseconds)

    def use(self, _: int, stream: int) -> None:
        self.device.use(self._streams[stream])

    def capture(self, thread: int, stream: int) -> None:
        """A graph capture begins on a stream, which the thread goes to; or it ends."""
        self._streams[stream].capturing ^= True
        self.use(thread, stream)

    def wait(self, _: int, nanoseconds: int) -> None:
        self.clock.ns += nanoseconds

    def fault(self, _: int, call: str) -> None:
        self.device.fault = call

    def hang_up(self, *_: object) -> None:
        recorder = switch.current_recorder()
        assert recorder is not None
        recorder.channel.close()
        self.hung_up = True


@pytest.mark.slow
@hypothesis.given(
    operations=strategies.lists(OPERATIONS, min_size=25, max_size=80),
    pairs=strategies.sampled_from([2, 5, 1024]),
)
@hypothesis.settings(max_examples=times(80, 1000), derandomize=not IN_FULL)
def test_whole_traces_arrive_and_the_rest_is_counted(
    outcome: Callable[..., tuple[Program, list[Span]]], operations: list[Operation], pairs: int
) -> None:
    program, spans = outcome(operations, pairs)
    dropped = Counter(program.counted) if program.hung_up else counts(spans)

    assert_whole_traces(spans, in_order=program.in_order and not program.hung_up)
    stages = {span.name.removesuffix(" (host)"): span for span in spans if span.name != "worker_step"}
    assert len(stages) + sum(dropped[reason] for reason in LEFT_OUT) == len(program.failed)
    assert len(spans) - len(stages) + dropped["step_too_deep"] == program.steps
    assert {name for name, span in stages.items() if span.status == ERROR} == {
        name for name, failed in program.failed.items() if failed and name in stages
    }
    assert not dropped["internal_error"]


def lost() -> dict[str, int]:
    """What has been lost so far."""
    recorder = switch.current_recorder()
    return {} if recorder is None else recorder.drops.totals()


def run(operations: list[Operation], pairs: int) -> Program:
    """Run the operations, then one step more, which carries the counts; all that is to arrive has."""
    program = Program(pairs)
    switch.enable_on(program.device, chosen())
    try:
        for operation in operations:
            program.do(*operation)
        program.end()
        for _ in range(2):
            program.clock.ns += 3600 * SECOND
            assert otel_npu.flush(300), lost()
            with otel_npu.step("last"):
                pass
            program.steps += 1
        assert otel_npu.flush(300)
        program.counted = lost()
    finally:
        program.end()
        otel_npu.disable()
    return program


def counts(spans: list[Span]) -> Counter[str]:
    found: Counter[str] = Counter()
    for span in spans:
        for key, value in span.attributes.items():
            if key.startswith("npu.dropped."):
                found[key.removeprefix("npu.dropped.")] += value
    return found


def assert_whole_traces(spans: list[Span], *, in_order: bool) -> None:
    """Each span is there once, below a parent that has arrived. A step lasts as long as its stages.

    And as long as the steps in it, if those were left before it.
    """
    by_id = {span.span_id: span for span in spans}
    assert len(by_id) == len(spans)
    roots = Counter(span.trace_id for span in spans if not span.parent_span_id)
    assert set(roots) == {span.trace_id for span in spans}
    assert set(roots.values()) <= {1}
    for span in spans:
        assert 0 < span.start_ns <= span.end_ns
        if span.parent_span_id:
            parent = by_id[span.parent_span_id]
            assert parent.trace_id == span.trace_id
            if parent.name == "worker_step" and (in_order or span.name != "worker_step"):
                assert parent.start_ns <= span.start_ns
                assert span.end_ns <= parent.end_ns
