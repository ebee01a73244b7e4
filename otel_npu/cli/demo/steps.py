"""Received spans as steps with their stages, what is usual among them, and what is not."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from otel_npu import semconv

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from otel_npu.cli.demo.receiver import Span

_MOST: Final = 0.5


class StageSpan(NamedTuple):
    """A stage in its step: its name below the names of the stages around it, and its span."""

    path: tuple[str, ...]
    span: Span

    @property
    def ms(self) -> float:
        """How long it took."""
        return (self.span.end_ns - self.span.start_ns) * 1e-6


@dataclass(frozen=True)
class TracedStep:
    """One step, its stages in the order in which they began."""

    span: Span
    stages: list[StageSpan]

    @property
    def kind(self) -> str:
        """Prefill or decode."""
        return str(self.span.attributes.get(semconv.STEP_KIND, ""))

    @property
    def number(self) -> int:
        """As the traced process counts its steps, from 1."""
        return int(self.span.attributes[semconv.STEP_NUMBER])

    @property
    def ms(self) -> float:
        """From the first stage's start to the last one's end."""
        return (self.span.end_ns - self.span.start_ns) * 1e-6


class Outlier(NamedTuple):
    """Where the slowest step spent its time, and what is usual there; from the outside in."""

    step: TracedStep
    stages: list[tuple[StageSpan, float]]


def traced_steps(spans: Iterable[Span]) -> list[TracedStep]:
    """The steps among the spans, by number."""
    children: defaultdict[bytes, list[Span]] = defaultdict(list)
    tops = []
    for span in spans:
        if span.name == semconv.WORKER_STEP:
            tops.append(span)
        else:
            children[span.parent_id].append(span)

    def below(span: Span, path: tuple[str, ...]) -> Iterable[StageSpan]:
        for child in sorted(children[span.span_id], key=lambda child: (child.start_ns, child.end_ns)):
            own = (*path, child.name)
            yield StageSpan(own, child)
            yield from below(child, own)

    steps = [TracedStep(top, list(below(top, ()))) for top in tops]
    return sorted(steps, key=lambda step: step.number)


def stage_times(steps: Sequence[TracedStep]) -> dict[str, dict[tuple[str, ...], list[float]]]:
    """Milliseconds of each stage, by the kind of step and the stage's path."""
    times: dict[str, dict[tuple[str, ...], list[float]]] = {}
    for step in steps:
        of_kind = times.setdefault(step.kind, {})
        for stage in step.stages:
            of_kind.setdefault(stage.path, []).append(stage.ms)
    return times


def percentile(times: Sequence[float], share: float) -> float:
    """The smallest time that this share of all of them does not exceed."""
    return sorted(times)[max(0, math.ceil(share * len(times)) - 1)]


def typical(steps: Sequence[TracedStep], kind: str) -> TracedStep | None:
    """The step of this kind with the median time."""
    of_kind = sorted((step for step in steps if step.kind == kind), key=lambda step: step.ms)
    return of_kind[(len(of_kind) - 1) // 2] if of_kind else None


def slowest(steps: Sequence[TracedStep]) -> Outlier | None:
    """The step that is furthest above the median of its kind, and the stages that made it so."""
    medians = {step.kind: median.ms for step in steps if (median := typical(steps, step.kind))}
    if not steps:
        return None
    step = max(steps, key=lambda step: step.ms / medians[step.kind])
    usual = {path: percentile(times, 0.5) for path, times in stage_times(steps)[step.kind].items()}
    found: list[tuple[StageSpan, float]] = []
    excess = step.ms - medians[step.kind]
    path: tuple[str, ...] = ()
    while True:
        inside = [stage for stage in step.stages if stage.path[:-1] == path]
        worst = max(inside, key=lambda stage: stage.ms - usual[stage.path], default=None)
        if worst is None or worst.ms - usual[worst.path] <= _MOST * excess:
            return Outlier(step, found)
        found.append((worst, usual[worst.path]))
        path = worst.path
