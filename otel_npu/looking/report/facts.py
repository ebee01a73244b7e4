"""What spans say of where the time went, in figures. Times are seconds."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from otel_npu import semconv

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from otel_npu.looking.model import Model, Request, Run, Step

_Z: Final = 1.96  # of a 95 % interval
_LEAST: Final = 8
"""Of fewer values no interval is given."""


class Middle(NamedTuple):
    """The median of some values, and the 95 % interval for that of all such values."""

    value: float
    low: float
    high: float


@dataclass
class StageFacts:
    """One stage: how long each of its uses took, and on whose clock."""

    durations: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)
    """How long the host took for those that the device timed."""
    outermost: float = 0.0
    """In all, of its uses that were in no other stage."""


@dataclass
class RankFacts:
    """One rank, or one process without ranks."""

    name: str
    steps: int = 0
    seconds: float = 0.0
    """From its first step to its last."""
    busy: float = 0.0
    idle: float | None = None
    stages: dict[str, float] = field(default_factory=dict)
    """Seconds by stage, of the outermost."""
    launch_bound: int = 0
    judged: int = 0
    """So many steps are known to be launch-bound or not."""
    straggles: int = 0
    skews: list[float] = field(default_factory=list)
    uncertainties: list[float] = field(default_factory=list)


class Facts:
    """All figures of one model.

    Args:
        model: The steps and requests.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.stages: dict[str, StageFacts] = {}
        self.ranks: dict[tuple[str, int], RankFacts] = {}
        self.kinds: dict[str, list[float]] = {}
        for step in model.steps:
            self.kinds.setdefault(step.kind, []).append(step.duration_ns * 1e-9)
            for run in step.runs:
                self._run(step, run)
        for of_rank, runs in self._runs().items():
            first, last = min(run.span.start_ns for run in runs), max(run.span.end_ns for run in runs)
            self.ranks[of_rank].seconds = (last - first) * 1e-9

    @property
    def seconds(self) -> float:
        """From the first step to the end of the last."""
        steps = self.model.steps
        return (max(step.end_ns for step in steps) - steps[0].start_ns) * 1e-9 if steps else 0.0

    @property
    def tokens(self) -> int:
        """How many were scheduled."""
        return sum(int(step.attributes.get(semconv.STEP_TOKENS, 0)) for step in self.model.steps)

    def sentence(self) -> str:
        """Where the time went, in words."""
        steps = self.model.steps
        if not steps:
            return f"There are {len(self.model.requests)} requests here, and no steps."
        durations = [step.duration_ns * 1e-9 for step in steps]
        text = f"In {self.seconds:.1f} s there were {len(steps)} steps, half of them within {_ms(median(durations))}."
        busiest = max(self.ranks.values(), key=lambda rank: rank.busy, default=None)
        if busiest is None or not busiest.stages:
            return text
        stage, took = max(busiest.stages.items(), key=lambda item: item[1])
        whole = busiest.seconds or 1.0
        name = busiest.name[0].upper() + busiest.name[1:]
        text += (
            f" {name} was busy for {busiest.busy / whole:.0%} of the time, most of it with {stage} ({took / whole:.0%})"
        )
        if busiest.idle is not None:
            text += f", and had nothing to do for {busiest.idle / whole:.0%}"
        if busiest.judged:
            share = busiest.launch_bound / busiest.judged
            text += f"; in {share:.0%} of its steps it waited for the host to launch work"
        return text + "."

    def _runs(self) -> dict[tuple[str, int], list[Run]]:
        runs: dict[tuple[str, int], list[Run]] = {}
        for step in self.model.steps:
            for run in step.runs:
                runs.setdefault(rank_key(run), []).append(run)
        return runs

    def _run(self, step: Step, run: Run) -> None:
        rank = self.ranks.setdefault(rank_key(run), RankFacts(rank_name(run)))
        attributes = run.span.attributes
        rank.steps += 1
        idle = attributes.get(semconv.STEP_IDLE)
        if idle is not None:
            rank.idle = (rank.idle or 0.0) + float(idle)
        bound = attributes.get(semconv.STEP_LAUNCH_BOUND)
        if bound is not None:
            rank.judged += 1
            rank.launch_bound += bool(bound)
        if step.engine is not None and step.engine.attributes.get(semconv.STEP_STRAGGLER) == run.rank:
            rank.straggles += 1
            rank.skews.append(float(step.engine.attributes.get(semconv.STEP_SKEW, 0.0)))
        outermost = []
        for stage in run.stages:
            seconds = stage.duration_ns * 1e-9
            facts = self.stages.setdefault(stage.name, StageFacts())
            facts.durations.append(seconds)
            if stage.attributes.get(semconv.TIMING) == semconv.TIMING_DEVICE:
                facts.host.append(float(stage.attributes.get(semconv.HOST_DURATION, 0.0)))
            if semconv.CLOCK_UNCERTAINTY in stage.attributes:
                rank.uncertainties.append(float(stage.attributes[semconv.CLOCK_UNCERTAINTY]))
            if stage is run.span or self.model.parent(stage) is run.span:
                facts.outermost += seconds
                rank.stages[stage.name] = rank.stages.get(stage.name, 0.0) + seconds
                outermost.append((stage.start_ns, stage.end_ns))
        rank.busy += _covered(outermost)


def rank_key(run: Run) -> tuple[str, int]:
    """Whose part of a step it is: of which process, and of which rank."""
    return str(run.span.resource.get(semconv.SERVICE_INSTANCE_ID, "")), -1 if run.rank is None else run.rank


def rank_name(run: Run) -> str:
    """The same, for a person."""
    host = run.span.resource.get(semconv.HOST_NAME, "")
    if run.rank is not None:
        replica = run.span.attributes.get(semconv.DP_RANK)
        return f"rank {run.rank} of replica {replica}" if replica else f"rank {run.rank}"
    return f"process {run.span.resource.get(semconv.PROCESS_PID, '')}".strip() or str(host)


def _covered(intervals: Iterable[tuple[int, int]]) -> float:
    """Seconds that are in any of these."""
    covered, until = 0, -1
    for start_ns, end_ns in sorted(intervals):
        covered += max(0, end_ns - max(start_ns, until))
        until = max(until, end_ns)
    return covered * 1e-9


def median(values: Sequence[float]) -> float:
    """The middle one; 0 of none."""
    return quantile(sorted(values), 0.5)


def quantile(ordered: Sequence[float], share: float) -> float:
    """Of values in their order, the one below which this share of them is; 0 of none."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def middle(values: Sequence[float]) -> Middle:
    """The median with its interval, by order statistics: nothing is assumed of how the values are distributed."""
    ordered = sorted(values)
    half = _Z * math.sqrt(len(ordered)) / 2
    low = max(0, math.floor(len(ordered) / 2 - half))
    high = min(len(ordered) - 1, math.ceil(len(ordered) / 2 + half))
    return Middle(quantile(ordered, 0.5), ordered[low], ordered[high])


def ratio(before: Sequence[float], after: Sequence[float]) -> Middle | None:
    """How many times the median of one is that of the other, with a 95 % interval; None of too few values.

    By Price and Bonett (2002), "Distribution-free confidence intervals for difference and ratio of medians".
    """
    if len(before) < _LEAST or len(after) < _LEAST or median(before) <= 0 or median(after) <= 0:
        return None
    variance = _variance_of_log_median(before) + _variance_of_log_median(after)
    value = math.log(median(after) / median(before))
    half = _Z * math.sqrt(variance)
    return Middle(math.exp(value), math.exp(value - half), math.exp(value + half))


def _variance_of_log_median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    count = len(ordered)
    place = max(1, round((count + 1) / 2 - math.sqrt(count)))
    low, high = max(ordered[place - 1], 1e-12), max(ordered[count - place], 1e-12)
    # The probability that the median is outside of these two, and what of a normal distribution is.
    outside = 2 * sum(math.comb(count, i) / 2**count for i in range(place)) if count < _EXACT else 0.0455
    z = _normal_quantile(1 - outside / 2)
    return ((math.log(high) - math.log(low)) / (2 * z)) ** 2


_EXACT: Final = 500


def _normal_quantile(share: float) -> float:
    from statistics import NormalDist

    return NormalDist().inv_cdf(min(max(share, 0.5001), 1 - 1e-9))


def request_row(request: Request) -> dict[str, Any]:
    """Where the time of a request went; None for what it has not."""

    def took(name: str) -> float | None:
        spans = [span for span in request.spans if span.name == name]
        return sum(span.duration_ns for span in spans) * 1e-9 if spans else None

    phases = [phase for phase in map(request.phase, (semconv.PREFILL, semconv.DECODE)) if phase is not None]
    device = [float(phase.attributes.get(semconv.REQUEST_DEVICE_TIME, 0.0)) for phase in phases]
    shared = [float(phase.attributes.get(semconv.REQUEST_ATTRIBUTED_DEVICE_TIME, 0.0)) for phase in phases]
    return {
        "name": request.name,
        "seconds": (request.end_ns - request.start_ns) * 1e-9,
        "queue": took(semconv.QUEUE),
        "kv": took(semconv.KV_LOAD),
        "prefill": took(semconv.PREFILL),
        "decode": took(semconv.DECODE),
        "steps": sum(int(phase.attributes.get(semconv.REQUEST_STEPS, 0)) for phase in phases),
        "device": sum(device) if phases else None,
        "share": sum(shared) if phases else None,
    }


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.2f} ms"
