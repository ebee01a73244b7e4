"""What spans are of: steps with their ranks and stages, and requests with their phases."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from otel_npu import semconv

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from otel_npu.looking.span import Span

LLM_REQUEST: Final = "llm_request"
REQUEST_SPANS: Final = (
    *(LLM_REQUEST, semconv.QUEUE, semconv.PREFILL, semconv.DECODE, semconv.KV_LOAD, semconv.KV_SEND),
    *(semconv.PREFILL_STEP, semconv.DECODE_STEP, semconv.OTHER_STEPS),
)


class Run:
    """A rank's part of a step, or a program's own step.

    Attributes:
        span: Its `worker_step`, or the one stage that ran in no step.
        rank: Which rank; None where there are none.
        stages: Its stages, in the order of their starts.
    """

    def __init__(self, span: Span) -> None:
        self.span = span
        rank = span.attributes.get(semconv.RANK)
        self.rank: int | None = rank if isinstance(rank, int) else None
        self.stages: list[Span] = []


class Step:
    """A step. Times are Unix times in nanoseconds.

    Attributes:
        engine: Its `engine_step`; None for a program's own step, and where the engine is elsewhere.
        runs: Of each rank.
    """

    def __init__(self) -> None:
        self.engine: Span | None = None
        self.runs: list[Run] = []

    @property
    def spans(self) -> list[Span]:
        """Its outermost spans."""
        return [run.span for run in self.runs] if self.engine is None else [self.engine]

    @property
    def start_ns(self) -> int:
        """When it began."""
        return min(span.start_ns for span in self.spans)

    @property
    def end_ns(self) -> int:
        """When it ended."""
        return max(span.end_ns for span in self.spans)

    @property
    def duration_ns(self) -> int:
        """How long it took."""
        return self.end_ns - self.start_ns

    @property
    def attributes(self) -> dict[str, Any]:
        """What its outermost span says."""
        return self.spans[0].attributes

    @property
    def kind(self) -> str:
        """What it did, such as `decode`."""
        return str(self.attributes.get(semconv.STEP_KIND, "")) or self.spans[0].name


class Request:
    """A request, by its spans.

    Attributes:
        spans: Its queue, prefill, decode and so on, and what is below them.
    """

    def __init__(self) -> None:
        self.spans: list[Span] = []

    def phase(self, name: str) -> Span | None:
        """Its span of this name, if it has one."""
        return next((span for span in self.spans if span.name == name), None)

    @property
    def start_ns(self) -> int:
        """When it began."""
        return min(span.start_ns for span in self.spans)

    @property
    def end_ns(self) -> int:
        """When it ended."""
        return max(span.end_ns for span in self.spans)

    @property
    def name(self) -> str:
        """Its id as its client knows it or, where no span says it, its trace."""
        for key in (semconv.RESPONSE_ID, semconv.REQUEST_ID):
            for span in self.spans:
                if key in span.attributes:
                    return str(span.attributes[key])
        return self.spans[0].trace_id


class Model:
    """All that some spans show.

    Args:
        spans: In any order, of any number of processes. One that is there twice counts once.
    """

    def __init__(self, spans: Iterable[Span]) -> None:
        self._by_id = {(span.trace_id, span.span_id): span for span in spans}
        self.spans = sorted(self._by_id.values(), key=lambda span: (span.start_ns, -span.end_ns))
        self._tops: dict[int, Span | None] = {}
        steps: dict[str, Step] = {}
        requests: dict[tuple[str, str], Request] = {}
        runs: dict[str, Run] = {}
        for span in self.spans:
            top = self.top(span)
            if top is None:
                continue
            if top.name in REQUEST_SPANS:
                key = top.trace_id, top.span_id if top.name == LLM_REQUEST else top.parent_id or top.span_id
                requests.setdefault(key, Request()).spans.append(span)
            elif span is top:
                self._place(span, steps, runs)
        for span in self.spans:
            top = self.top(span)
            if top is not None and top.name not in REQUEST_SPANS and (span is not top or _bare(span)):
                run = runs.get(top.span_id)
                if run is not None:
                    run.stages.append(span)
        self.steps: Sequence[Step] = sorted((step for step in steps.values()), key=lambda step: step.start_ns)
        self.requests: Sequence[Request] = sorted(requests.values(), key=lambda request: request.start_ns)

    def parent(self, span: Span) -> Span | None:
        """The span around it, if that is here."""
        return self._by_id.get((span.trace_id, span.parent_id))

    def top(self, span: Span) -> Span | None:
        """What it is a part of: an engine's own span, a rank's part of a step, or a request's phase."""
        chain: list[Span] = []
        at: Span | None = span
        found: Span | None = None
        while at is not None and len(chain) < len(self._by_id):
            if id(at) in self._tops:
                found = self._tops[id(at)]
                break
            chain.append(at)
            parent = self.parent(at)
            if _is_top(at, parent):
                found = at
                break
            at = parent
        for each in chain:
            self._tops[id(each)] = found
        return found

    def _place(self, span: Span, steps: dict[str, Step], runs: dict[str, Run]) -> None:
        if span.name == semconv.ENGINE_STEP:
            steps.setdefault(span.span_id, Step()).engine = span
            return
        run = runs[span.span_id] = Run(span)
        key = span.parent_id if run.rank is not None and span.parent_id else span.span_id
        steps.setdefault(key, Step()).runs.append(run)


def _is_top(span: Span, parent: Span | None) -> bool:
    if span.name.startswith((semconv.WORKER_STEP, semconv.ENGINE_STEP)):
        return True
    if span.name in REQUEST_SPANS and (parent is None or parent.name not in REQUEST_SPANS[1:]):
        return True
    return _bare(span) and (parent is None or not _ours(parent))


def _bare(span: Span) -> bool:
    """Whether it is a stage."""
    return semconv.HOST_DURATION in span.attributes


def _ours(span: Span) -> bool:
    return _bare(span) or span.name in REQUEST_SPANS or span.name.startswith((semconv.WORKER_STEP, semconv.ENGINE_STEP))
