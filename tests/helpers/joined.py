"""Engines, their workers and a front end as the relay sees them: frames in, spans out, on a clock of the test's own."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from otel_npu.drops import Drops
from otel_npu.relay.assembler import Assembler
from otel_npu.relay.client import Client
from otel_npu.relay.joiner import Joiner
from otel_npu.relay.spans import span_limits
from otel_npu.relay.wall import WallClock
from tests.helpers.built import hello, request, request_end, scheduled, stage, step, transfers, updated

if TYPE_CHECKING:
    from collections.abc import Sequence

    from opentelemetry.sdk.trace import ReadableSpan

    from otel_npu.relay.account import Account
    from otel_npu.wire import frames

UNIX_NS = 1_700_000_000_000_000_000  # Unix time when the host's monotonic clock is at 0
MS = 1_000_000
STEP_NS = 10 * MS
FORWARD_NS, SAMPLE_NS = 6 * MS, 2 * MS


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def times(span: ReadableSpan) -> tuple[float, float]:
    """Start and end in milliseconds of the host's monotonic clock."""
    assert span.start_time is not None
    assert span.end_time is not None
    return (span.start_time - UNIX_NS) / MS, (span.end_time - UNIX_NS) / MS


def span_id(span: ReadableSpan) -> int:
    assert span.context is not None
    return int(span.context.span_id)


def trace_id(span: ReadableSpan) -> int:
    assert span.context is not None
    return int(span.context.trace_id)


def parent_id(span: ReadableSpan) -> int | None:
    return None if span.parent is None else int(span.parent.span_id)


def id_of(number: int) -> bytes:
    """The span id of the step or request with this number."""
    return number.to_bytes(8, "big")


def host_stage(name: str, start_ns: int, duration_ns: int, **changes: Any) -> frames.Stage:
    """A stage that lies exactly there."""
    return stage(
        name=name,
        entered_ns=start_ns,
        exited_ns=start_ns + duration_ns,
        device_ns=None,
        duration_ns=duration_ns,
        **changes,
    )


class Joined:
    """A joiner with one engine, its workers and a front end.

    Step n is scheduled at 10 n ms; it runs from there for 8 ms: 6 of forward, with attention inside, and 2 of sample;
    its output is taken in after 9 ms. Request n arrives at n ms.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.puts: list[tuple[Account, list[ReadableSpan]]] = []
        self.drops = Drops()
        self.wall = WallClock(monotonic=lambda: 0, unix=lambda: UNIX_NS)
        self.joiner = Joiner(self.wall, self._put, self.drops, now=lambda: self.now)
        self.engine, self.front_end = self.client(pid=1), self.client(pid=2)
        self._workers: dict[int, Client] = {}

    def _put(self, spans: Sequence[ReadableSpan], account: Account) -> None:
        self.puts.append((account, list(spans)))

    def client(self, **changes: Any) -> Client:
        client = Client()
        greeting = hello(**{"device_kind": "cpu", **changes})
        client.greeted = Assembler(greeting, self.wall, span_limits, drops=self.drops)
        return client

    @property
    def spans(self) -> list[ReadableSpan]:
        """All spans but the workers'."""
        return [span for _, spans in self.puts for span in spans]

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.spans if span.name == name]

    def only(self, name: str) -> ReadableSpan:
        [span] = self.named(name)
        return span

    def told(self, span_name: str = "decode") -> dict[str, Any]:
        """What the only span of this name says of its request."""
        prefix = "npu.request."
        said = attributes(self.only(span_name))
        return {key.removeprefix(prefix): value for key, value in said.items() if key.startswith(prefix)}

    def children(self, span: ReadableSpan) -> list[ReadableSpan]:
        return [other for other in self.spans if parent_id(other) == span_id(span)]

    def pass_seconds(self, seconds: float) -> None:
        self.now += seconds
        self.joiner.tick()

    # What the processes say.

    def open(self, *numbers: int, **changes: Any) -> None:
        for number in numbers:
            arrived_unix_ns = UNIX_NS + number * MS
            self.joiner.take(self.engine, request(number, **{"arrived_unix_ns": arrived_unix_ns, **changes}))

    def schedule(self, number: int, served: dict[int, int] | None = None, /, **changes: Any) -> None:
        """A step that serves these requests with so many tokens; `prefill`: of all, or of those in the set."""
        served = served or {}
        tokens = list(served.values())
        prefill = changes.pop("prefill", False)
        prefilled = prefill if isinstance(prefill, set) else served if prefill else ()
        fields: dict[str, Any] = {
            "opened_ns": number * STEP_NS - MS,
            "scheduled_ns": number * STEP_NS - MS // 2,
            "requests": list(served),
            "tokens": tokens,
            "prefills": [number in prefilled for number in served],
            "total_tokens": sum(tokens) or 1,
            "total_requests": len(served) or 1,
            **changes,
        }
        self.joiner.take(self.engine, scheduled(number, **fields))

    def run(self, number: int, rank: int = 0, **changes: Any) -> Sequence[ReadableSpan]:
        """A rank's run of a step; the worker's own spans."""
        start_ns = number * STEP_NS
        fields: dict[str, Any] = {
            "trace_id": b"t" * 16,
            "span_id": (1000 * (rank + 1) + number).to_bytes(8, "big"),
            "parent_span_id": id_of(number),
            "rank": rank,
            "returns_output": rank == 0,
            "stages": [
                host_stage("forward", start_ns, FORWARD_NS),
                host_stage("attention", start_ns + MS, 2 * MS, parent=0),
                host_stage("sample", start_ns + FORWARD_NS, SAMPLE_NS),
            ],
            **changes,
        }
        worker = self._workers.setdefault(rank, self.client(pid=10 + rank))
        return worker.assembler.step(step(number, **fields), functools.partial(self.joiner.ran, worker))

    def update(self, number: int, gave: dict[int, int] | None = None, /, **changes: Any) -> None:
        """The output of a step is taken in: so many tokens for each of these requests."""
        gave = gave or {}
        fields: dict[str, Any] = {
            "closed_ns": number * STEP_NS + 9 * MS,
            "requests": list(gave),
            "new_tokens": list(gave.values()),
            **changes,
        }
        self.joiner.take(self.engine, updated(number, **fields))

    def move(self, at_ms: float, **changes: Any) -> None:
        """KV cache is on its way, or has arrived."""
        self.joiner.take(self.engine, transfers(at_ns=round(at_ms * MS), **changes))

    def step(self, number: int, *requests: int, **changes: Any) -> None:
        """A whole step that gives each of these requests one token."""
        finished = changes.pop("finished", [])
        self.schedule(number, dict.fromkeys(requests, 1), **changes)
        self.run(number)
        self.update(number, dict.fromkeys(requests, 1), finished=finished)

    def end(self, number: int, output_tokens: int, reason: str = "stop", at_ms: float = 10_000, **changes: Any) -> None:
        """The front end is done with a request."""
        ended_unix_ns = UNIX_NS + round(at_ms * MS)
        frame = request_end(number, ended_unix_ns=ended_unix_ns, output_tokens=output_tokens, reason=reason, **changes)
        self.joiner.take(self.front_end, frame)

    def is_empty(self) -> bool:
        """Whether nothing is kept of any step or request."""
        joiner = self.joiner
        kept: list[Any] = [joiner._steps, joiner._requests, joiner._ending, joiner._strange_ends]
        for engine in joiner._engines.values():
            kept += [engine.requests, engine.steps, engine.sends]
        return not any(kept) and not joiner.waiting
