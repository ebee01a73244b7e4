"""What arrived from a vLLM, by trace and by request, and what holds for all of it."""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from otel_npu import semconv
from tests.helpers.traced import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

    from tests.helpers.receiver import Receiver, Span

LLM_REQUEST = "llm_request"  # vLLM's own
OURS = semconv.SCOPE
PHASES = (semconv.QUEUE, semconv.PREFILL, semconv.DECODE)
ARRIVAL_SECONDS = 180.0


@dataclass
class Spans:
    """Spans, and what lies in what."""

    all: list[Span]
    by_id: dict[tuple[str, str], Span] = field(init=False)
    _children: dict[tuple[str, str], list[Span]] = field(init=False)

    def __post_init__(self) -> None:
        self.by_id = {(span.trace_id, span.span_id): span for span in self.all}
        self._children = defaultdict(list)
        for span in self.all:
            self._children[span.trace_id, span.parent_span_id].append(span)

    def named(self, name: str) -> list[Span]:
        return [span for span in self.all if span.name == name]

    @property
    def worker_steps(self) -> list[Span]:
        """Each rank's steps: of several the name has the rank's number."""
        return [span for span in self.all if re.fullmatch(rf"{semconv.WORKER_STEP}( rank \d+)?", span.name)]

    @property
    def ours(self) -> list[Span]:
        return [span for span in self.all if span.scope == OURS]

    def children(self, span: Span, name: str | None = None) -> list[Span]:
        """Its children (of this name), by their start."""
        found = self._children[span.trace_id, span.span_id]
        return sorted((child for child in found if name in (None, child.name)), key=lambda child: child.start_ns)

    def child(self, span: Span, name: str) -> Span:
        """Its one child of this name."""
        children = self.children(span, name)
        assert len(children) == 1, f"{len(children)} of {name} in {span.name}: {self.names(span)}"
        return children[0]

    def descendants(self, span: Span) -> list[Span]:
        """All that lies in it."""
        return [below for child in self.children(span) for below in (child, *self.descendants(child))]

    def names(self, span: Span) -> list[str]:
        return [child.name for child in self.children(span)]

    def parent(self, span: Span) -> Span | None:
        return self.by_id.get((span.trace_id, span.parent_span_id)) if span.parent_span_id else None


def requests_of(receiver: Receiver, wanted: Callable[[Span], bool], count: int = 1) -> tuple[Spans, list[Span]]:
    """The spans, once so many `llm_request` that are wanted have arrived with all that lies in them."""

    spans = Spans(receiver.spans)

    def arrived() -> bool:
        nonlocal spans
        spans = Spans(receiver.spans)
        found = [span for span in spans.named(LLM_REQUEST) if wanted(span)]
        return len(found) >= count and all(_whole(spans, span) for span in found)

    try:
        eventually(arrived, f"{count} requests", ARRIVAL_SECONDS)
    except AssertionError as error:
        found = [span for span in spans.named(LLM_REQUEST) if wanted(span)]
        lacking = [(spans.children(span), span) for span in found if not _whole(spans, span)]
        raise AssertionError(
            f"{error}; there are {len(found)}, and {len(lacking)} lack something: {lacking[:2]}"
        ) from None
    found = [span for span in spans.named(LLM_REQUEST) if wanted(span)]
    assert len(found) == count
    return spans, found


def _whole(spans: Spans, request: Span) -> bool:
    """Whether all spans of a request have arrived: the last of them says why it ended."""
    return any(semconv.REQUEST_FINISH_REASON in span.attributes for span in spans.children(request))


def request_in(receiver: Receiver, trace_id: str) -> tuple[Spans, Span]:
    """The spans, and the one `llm_request` of this trace."""
    spans, [request] = requests_of(receiver, lambda span: span.trace_id == trace_id)
    return spans, request


def assert_phases(spans: Spans, request: Span, phases: Iterable[str] = PHASES) -> None:
    """A request has these phases, each once; all that lies in it lies within its time, and the phases follow on."""
    assert Counter(spans.names(request)) == Counter(phases), spans.names(request)
    for span in spans.descendants(request):
        assert request.start_ns <= span.start_ns <= span.end_ns <= request.end_ns, f"{span} outside {request}"
    in_order = [spans.child(request, phase) for phase in PHASES if phase in phases]
    for earlier, later in itertools.pairwise(in_order):
        assert earlier.end_ns <= later.end_ns
        assert earlier.start_ns <= later.start_ns


def assert_consistent(spans: Spans, callers: Collection[str] = ()) -> None:
    """What holds for everything that otel_npu sends.

    Args:
        spans: All that has ever arrived.
        callers: Span ids that are in no span here: those of the clients.
    """
    ours = spans.ours
    assert drops(spans) == {}
    ids = Counter((span.trace_id, span.span_id) for span in spans.all if span.scope == OURS)
    assert not [key for key, count in ids.items() if count > 1], "an id twice"
    assert len({span.span_id for span in ours}) == len(ours), "a span id twice"
    for span in ours:
        parent = spans.parent(span)
        if parent is None:
            known = not span.parent_span_id or span.parent_span_id in callers
            assert known, f"the parent is missing of {span}"
        else:
            _assert_inside(span, parent)
        assert len(set(span.links)) == len(span.links), f"a link twice in {span}"
        for link in span.links:
            assert link in spans.by_id, f"a link to a span that did not arrive in {span}"


def drops(spans: Spans) -> dict[str, int]:
    """What is said to have been left out."""
    counts: Counter[str] = Counter()
    for span in spans.ours:
        found = {name: value for name, value in span.attributes.items() if name.startswith(semconv.DROPPED_PREFIX)}
        counts.update(found)
    return dict(counts)


def _assert_inside(span: Span, parent: Span) -> None:
    assert span.start_ns <= span.end_ns, f"{span} ends before it starts"
    if parent.scope == OURS or parent.name == LLM_REQUEST:
        assert parent.start_ns <= span.start_ns, f"{span} starts before {parent}"
        # Blocks are kept for somebody else after the request is over.
        assert span.name == semconv.KV_SEND or span.end_ns <= parent.end_ns, f"{span} ends after {parent}"


def steps_of(receiver: Receiver, ranks: int = 1, *, all_kept: bool = False) -> Spans:
    """The spans, once each of the engine's steps has the spans of all ranks.

    Where all steps are kept, those that the requests speak of too: requests are made first, and may leave in a batch
    before the last of their steps.
    """

    def arrived() -> Spans | None:
        spans = Spans(receiver.spans)
        whole = all(len(spans.children(step)) >= ranks for step in spans.named(semconv.ENGINE_STEP))
        placed = all(spans.parent(step) is not None for step in spans.worker_steps)
        requests = spans.named(LLM_REQUEST) if all_kept else []
        served = all(len(linked_steps(spans, request)) >= _steps_said(spans, request) for request in requests)
        return spans if whole and placed and served else None

    found: Spans = eventually(arrived, "all steps have arrived", ARRIVAL_SECONDS)
    return found


def _steps_said(spans: Spans, request: Span) -> int:
    """In how many steps a request says that it was."""
    names = (semconv.REQUEST_STEPS, semconv.REQUEST_SURPLUS_STEPS)
    return sum(span.attributes.get(name, 0) for span in spans.children(request) for name in names)


def assert_steps_whole(spans: Spans, ranks: int = 1) -> None:
    """Every engine's step has a span of each rank, and every rank's step its stages."""
    for engine_step in spans.named(semconv.ENGINE_STEP):
        steps = spans.children(engine_step)
        expected = (
            [f"{semconv.WORKER_STEP} rank {rank}" for rank in range(ranks)] if ranks > 1 else [semconv.WORKER_STEP]
        )
        assert sorted(step.name for step in steps) == expected, f"{steps} in {engine_step}"
        assert sorted(step.attributes[semconv.RANK] for step in steps) == list(range(ranks))
        for step in steps:
            assert "forward" in spans.names(step), f"{spans.names(step)} in {step}"
    assert all(spans.parent(step) is not None for step in spans.worker_steps)


def assert_shares_add_up(spans: Spans, rel: float = 1e-6) -> None:
    """What the requests are said to have used of the device is what the steps that served them took of it.

    All steps are kept, and all requests in them are sampled.
    """
    attributed = sum(attributed_seconds(spans, request) for request in spans.named(LLM_REQUEST))
    served = [step for step in spans.named(semconv.ENGINE_STEP) if step.links]
    assert attributed == pytest.approx(sum(device_seconds(spans, step) for step in served), rel=rel)


def attributed_seconds(spans: Spans, request: Span) -> float:
    """A request's share of the device's time."""
    name = semconv.REQUEST_ATTRIBUTED_DEVICE_TIME
    return float(sum(span.attributes.get(name, 0.0) for span in spans.children(request)))


def device_seconds(spans: Spans, engine_step: Span) -> float:
    """How long a step took on the device of the rank that returns its output: the first, without a pipeline."""
    worker_step = next(step for step in spans.children(engine_step) if not step.attributes[semconv.RANK])
    stages = spans.children(worker_step)
    timed = [stage for stage in stages if stage.attributes[semconv.TIMING] == semconv.TIMING_DEVICE]
    return sum(stage.duration_ns for stage in timed or stages) / 1e9


def linked_steps(spans: Spans, request: Span) -> list[Span]:
    """The engine's steps that served this request, in order."""
    steps = [step for step in spans.named(semconv.ENGINE_STEP) if (request.trace_id, request.span_id) in step.links]
    return sorted(steps, key=lambda step: step.start_ns)
