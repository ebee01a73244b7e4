"""Received spans as traces: which request was the slowest, and in what."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from otel_npu import semconv
from otel_npu.cli.demo.front_end import LLM_REQUEST

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from otel_npu.cli.demo.receiver import Span


class Traces:
    """What has arrived, by who is whose parent.

    Args:
        spans: All of it.
    """

    def __init__(self, spans: Sequence[Span]) -> None:
        self._spans = spans
        self._children: defaultdict[tuple[bytes, bytes], list[Span]] = defaultdict(list)
        for span in spans:
            self._children[span.trace_id, span.parent_id].append(span)

    @property
    def requests(self) -> list[Span]:
        """Each request's `llm_request`."""
        return [span for span in self._spans if span.name == LLM_REQUEST]

    @property
    def steps(self) -> list[Span]:
        """The steps that were kept as traces of their own."""
        return [span for span in self._spans if span.name == semconv.ENGINE_STEP]

    def children(self, span: Span) -> list[Span]:
        """What lies right below a span, by its start."""
        return sorted(self._children[span.trace_id, span.span_id], key=lambda child: (child.start_ns, child.end_ns))

    def below(self, span: Span) -> Iterator[Span]:
        """All that lies below a span."""
        for child in self.children(span):
            yield child
            yield from self.below(child)

    def lacking(self) -> list[Span]:
        """The requests of which something has not arrived: the last span of each says why it ended."""
        return [
            request
            for request in self.requests
            if not any(semconv.REQUEST_FINISH_REASON in child.attributes for child in self.children(request))
        ]


@dataclass(frozen=True)
class Slow:
    """The decode step with the slowest stage, the longest request that it served, and the stages that made it slow.

    Attributes:
        request: That request's `llm_request`.
        step: The step, in that request's trace.
        stages: Its longest stage, the longest in that, and so on.
        usual_ms: How long the other steps of that request's decode took on average.
    """

    request: Span
    step: Span
    stages: list[Span]
    usual_ms: float


def slowest(traces: Traces) -> Slow | None:
    """What was slow; None without a decode of several steps.

    By a stage with nothing inside, not by the whole step: on a busy machine that may be long because the host was late.
    """
    found: list[tuple[Span, Span, Span, list[Span]]] = []
    for request in traces.requests:
        for decode in traces.children(request):
            steps = [span for span in traces.children(decode) if span.name == semconv.DECODE_STEP]
            found += [(request, decode, step, _longest(traces, step)) for step in steps]
    found = [item for item in found if item[3]]
    if not found:
        return None
    number = max(found, key=lambda item: item[3][-1].ms)[2].attributes[semconv.STEP_NUMBER]
    served = [item for item in found if item[2].attributes[semconv.STEP_NUMBER] == number]
    request, decode, step, stages = max(served, key=lambda item: item[0].ms)
    others = int(decode.attributes[semconv.REQUEST_STEPS]) - 1
    usual_ms = (float(decode.attributes[semconv.REQUEST_DEVICE_TIME]) * 1e3 - step.ms) / others
    return Slow(request, step, stages, usual_ms)


def _longest(traces: Traces, step: Span) -> list[Span]:
    stages: list[Span] = []
    around = step
    while inside := traces.children(around):
        around = max(inside, key=lambda span: span.ms)
        stages.append(around)
    return stages
