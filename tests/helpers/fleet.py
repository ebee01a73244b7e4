"""A simulated fleet: one engine and its ranks, step after step on a clock of the test's own, and the relays they tell.

The engine is followed by the plugin's own code; its workers' frames are made as the plugin's workers make them.
"""

from __future__ import annotations

import functools
import random
import types
from collections import Counter
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from otel_npu import semconv
from otel_npu.capture.context import Limiter
from otel_npu.drops import Drops
from otel_npu.ids import new_bytes
from otel_npu.relay.assembler import Assembler
from otel_npu.relay.client import Client
from otel_npu.relay.joiner import Joiner
from otel_npu.relay.metrics.counted import Metrics
from otel_npu.relay.metrics.plans import Plan
from otel_npu.relay.spans import span_limits
from otel_npu.relay.wall import WallClock
from otel_npu.slow import SlowSteps
from otel_npu.vllm import engine
from otel_npu.vllm.engine import STEP_ATTRIBUTE
from otel_npu.wire import frames
from tests.helpers.built import hello, request, request_end, scheduled, stage, step, unfinished, updated

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pytest
    from opentelemetry.sdk.metrics.export import MetricReader
    from opentelemetry.sdk.trace import ReadableSpan

    from otel_npu.relay.account import Account
    from tests.helpers.capturing import Captured

UNIX_NS: Final = 1_700_000_000_000_000_000
DEVICE_NS: Final = -987_654_321_000  # device time minus host time
MS: Final = 1_000_000
LATE_RANK: Final = 5
LATE_NS: Final = 4 * MS
DEFERRED_NS = 50_000_000  # for so long the engine keeps frames back, to send several at once
STAGES: Final = {
    "prepare_input": 900_000,
    "forward": 8_000_000,
    "attention": 3_000_000,
    "logits": 700_000,
    "sample": 400_000,
    "draft": 1_200_000,
    "post_process": 300_000,
}


class Relay:
    """Takes frames, gives spans and metrics."""

    def __init__(self, reader: MetricReader | None = None, plan: Plan = Plan()) -> None:  # noqa: B008  it is frozen
        self.now = 0.0
        self.spans: list[ReadableSpan] = []
        self.drops = Drops()
        self.reader = reader or InMemoryMetricReader()
        self.metrics = Metrics([plan], self.drops)
        self.metrics.read(self.metrics.shelves[0], self.reader)
        self._wall = WallClock(monotonic=lambda: 0, unix=lambda: UNIX_NS)
        self.joiner = Joiner(self._wall, self._put, self.drops, lambda: self.now)
        self.engine = self._client()
        self._workers: dict[int, Client] = {}

    def told(self, frame: Any) -> None:
        """The engine says something."""
        if isinstance(frame, frames.Request | frames.Scheduled | frames.Updated):
            self.joiner.take(self.engine, frame)

    def worker(self, rank: int, frame: Any) -> None:
        """A rank says something."""
        client = self._workers.get(rank) or self._workers.setdefault(rank, self._client())
        if isinstance(frame, frames.Step):
            self.spans += client.assembler.step(frame, functools.partial(self.joiner.ran, client))
        else:
            self.joiner.take(client, frame)

    def at(self, now_ns: int) -> None:
        """So late is it now."""
        self.now = now_ns * 1e-9
        self.joiner.tick()

    def points(self) -> dict[str, list[Any]]:
        """The points of each metric."""
        assert isinstance(self.reader, InMemoryMetricReader)
        data = self.reader.get_metrics_data()
        assert data is not None
        [resource] = data.resource_metrics
        return {metric.name: list(metric.data.data_points) for metric in resource.scope_metrics[0].metrics}

    def finish_requests(self) -> None:
        """A stage hangs, and a request that was in a step is over."""
        counted = self.engine.assembler.counted
        assert counted is not None
        counted.hang(unfinished(rank=0))
        self.joiner.take(self.engine, request(7))
        self.joiner.take(self.engine, scheduled(7, requests=[7], tokens=[1], prefills=[False], kept=False))
        self.worker(0, step(7, rank=0, returns_output=True, parent_span_id=(7).to_bytes(8, "big"), kept=False))
        self.joiner.take(self.engine, updated(7, requests=[7], new_tokens=[1], finished=[7]))
        self.joiner.take(self.engine, request_end(7))
        for span in self.spans:
            assert span.name

    def kept(self) -> dict[int, dict[int, set[int]]]:
        """Of each step that was kept the ranks that are there, by trace, by its number."""
        kept: dict[int, dict[int, set[int]]] = {}
        for span in self.spans:
            attributes = span.attributes or {}
            if span.context is not None and span.name.startswith(semconv.WORKER_STEP):
                number, rank = attributes[semconv.STEP_NUMBER], attributes[semconv.RANK]
                assert isinstance(number, int)
                assert isinstance(rank, int)
                kept.setdefault(number, {}).setdefault(span.context.trace_id, set()).add(rank)
        return kept

    def _put(self, spans: Sequence[ReadableSpan], _: Account) -> None:
        self.spans += spans

    def _client(self) -> Client:
        client = Client()
        greeting = hello(service_name="fleet", device_kind="npu")
        client.greeted = Assembler(greeting, self._wall, span_limits, None, self.metrics.process(greeting))
        return client


class StepContext(NamedTuple):
    """What a worker finds on the scheduler's output (`engine.StepContext`)."""

    trace_id: bytes
    span_id: bytes
    number: int
    kind: str
    kept: bool
    slow: tuple[bytes, ...]


class Fleet:
    """Runs steps: so many a second, each with seven stages on every rank, and now and then a slow one.

    Args:
        captured: The engine's process.
        relays: Which relay each rank tells; the engine tells the first.
        slow_share: How many of the steps take four times as long.
    """

    def __init__(
        self,
        captured: Captured,
        monkeypatch: pytest.MonkeyPatch,
        relays: Sequence[Relay],
        slow_share: float = 0.01,
        per_second: int = 50,
    ) -> None:
        self._sent: list[Any] = []
        self._deferred: list[tuple[int, Any, tuple[Any, ...]]] = []
        monkeypatch.setattr(captured.recorder, "send", lambda frame, _=None: self._sent.append(frame))
        monkeypatch.setattr(captured.recorder, "defer", self._defer)
        self.relays = relays
        self.ranks = len(relays)
        self.slow: set[int] = set()
        self.executed: Counter[tuple[str, int]] = Counter()
        """Nanoseconds by stage and rank."""
        self.count: Counter[tuple[str, int]] = Counter()
        self.idle: Counter[int] = Counter()
        """Nanoseconds between steps, by rank."""
        self.late = 0
        """In how many steps `LATE_RANK` began `LATE_NS` later than the others."""
        self._ends_ns: dict[int, int] = {}
        self._slow_share = slow_share
        self._period_ns = 1_000_000_000 // per_second
        self._random = random.Random(5)
        self._ns = self._free_ns = 1_000_000_000
        monkeypatch.setattr(engine, "native", None)  # the clock and what is deferred are this one's own
        monkeypatch.setattr(engine, "perf_counter_ns", lambda: self._ns)
        self._scheduler: Any = types.SimpleNamespace(
            requests={}, add_request=lambda _: None, schedule=self._schedule, update_from_output=lambda *_: {}
        )
        config = types.SimpleNamespace(parallel_config=types.SimpleNamespace(world_size=self.ranks))
        followed = engine.EngineSteps(self._scheduler, config)
        followed.limiter = Limiter(2, lambda: self._ns)
        followed._slow_steps = SlowSteps(3, captured.recorder.drops, lambda: self._ns)

    def run(self, steps: int) -> None:
        """So many more; of each the output is there when the device has run it, before the second after it begins."""
        running: list[tuple[int, Any]] = []
        for _ in range(steps):
            self._ns += self._period_ns
            while running and running[0][0] <= self._ns:
                self._update(*running.pop(0))
            output = self._scheduler.schedule()
            running.append((self._run(output), output))
            self._tell_relays()
        while running:
            self._update(*running.pop(0))
        self._make_deferred()
        self._tell_relays()
        for relay in dict.fromkeys(self.relays):
            relay.at(self._free_ns + 10_000_000_000)

    def _defer(self, _dropped: dict[str, int], make: Any, *args: Any) -> None:
        self._deferred.append((self._ns, make, args))
        if self._ns - self._deferred[0][0] > DEFERRED_NS:
            self._make_deferred()

    def _make_deferred(self) -> None:
        deferred, self._deferred = self._deferred, []
        self._sent += [make(*args) for _, make, args in deferred]

    def _schedule(self) -> Any:
        return types.SimpleNamespace(
            num_scheduled_tokens={"a": 1, "b": 3},
            total_num_scheduled_tokens=4,
            finished_req_ids=set(),
            preempted_req_ids=None,
            scheduled_new_reqs=[],
            scheduled_spec_decode_tokens={},
        )

    def _run(self, output: Any) -> int:
        """Every rank runs the step; when its output is there."""
        context = StepContext(*getattr(output, STEP_ATTRIBUTE))
        slow = self._random.random() < self._slow_share and context.number > 50
        if slow:
            self.slow.add(context.number)
        start_ns = max(self._ns + 100_000, self._free_ns)
        late = context.number % 20 == 0
        self.late += late
        for rank, relay in enumerate(self.relays):
            if context.slow:
                relay.worker(rank, frames.Keep(semconv.SLOW, list(context.slow)))
            begin_ns = start_ns + LATE_NS if late and rank == LATE_RANK else start_ns
            end_ns = self._rank(relay, rank, context, begin_ns, 4 if slow else 1)
            self._free_ns = max(self._free_ns, end_ns)
        return self._free_ns + 500_000

    def _rank(self, relay: Relay, rank: int, context: StepContext, start_ns: int, factor: int) -> int:
        at_ns, stages = start_ns, list[frames.Stage]()
        self.idle[rank] += start_ns - self._ends_ns.get(rank, start_ns)
        for name, usual_ns in STAGES.items():
            duration_ns = round(usual_ns * self._random.uniform(0.95, 1.05)) * factor
            entered_ns = self._ns + 1000 * len(stages)
            stages.append(
                stage(
                    name=name,
                    entered_ns=entered_ns,
                    exited_ns=entered_ns + 900,
                    device_ns=at_ns + DEVICE_NS,
                    duration_ns=duration_ns,
                )
            )
            at_ns += duration_ns
            self.executed[name, rank] += duration_ns
            self.count[name, rank] += 1
        frame = step(
            context.number,
            trace_id=context.trace_id,
            span_id=new_bytes(8),
            parent_span_id=context.span_id,
            kind=context.kind,
            rank=rank,
            returns_output=rank == 0,
            kept=context.kept,
            opened_ns=self._ns,
            closed_ns=self._ns + 10_000,
            seen_ns=at_ns + 50_000,
            attributes={semconv.TP_RANK: rank, semconv.DP_RANK: 0},
            stages=stages,
        )
        relay.worker(rank, frame)
        self._ends_ns[rank] = at_ns
        return at_ns

    def _update(self, ready_ns: int, output: Any) -> None:
        now_ns, self._ns = self._ns, ready_ns
        self._scheduler.update_from_output(output)
        self._tell_relays()
        self._ns = max(now_ns, ready_ns)

    def _tell_relays(self) -> None:
        for frame in self._sent:
            self.relays[0].told(frame)
        self._sent.clear()
        for relay in dict.fromkeys(self.relays):
            relay.at(self._ns)
