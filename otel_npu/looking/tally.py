"""What a session did in the last seconds: its steps, stages and ranks, counted as they come."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, Final

from otel_npu import semconv
from otel_npu.drops import add_up
from otel_npu.looking.slowest import Slowest
from otel_npu.relay.verdicts import alike

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from opentelemetry.sdk.trace import ReadableSpan

    from otel_npu.relay.placing import Place, Ran
    from otel_npu.wire.frames import Hello, Scheduled, Stage, Unfinished

WINDOW_SECONDS: Final = 10
"""Of so many seconds the figures are."""
_KEPT_SECONDS: Final = 8 * WINDOW_SECONDS
_SECOND_NS: Final = 1_000_000_000


class Stages:
    """The uses of one stage in one second, times in nanoseconds."""

    __slots__ = ("device_bound", "device_ns", "durations", "host_ns", "launch_bound", "on_device")

    def __init__(self) -> None:
        self.durations: list[int] = []
        self.on_device = self.host_ns = self.device_ns = self.launch_bound = self.device_bound = 0

    def add(self, stage: Stage, place: Place) -> None:
        """Count one use."""
        self.durations.append(stage.duration_ns)
        if stage.device_ns is None:
            return
        self.on_device += 1
        self.host_ns += stage.exited_ns - stage.entered_ns
        self.device_ns += stage.duration_ns
        bound = alike(stage, place)
        if bound is not None:
            self.launch_bound += bound
            self.device_bound += not bound


class Rank:
    """What one rank, or one process without ranks, did in one second, times in nanoseconds."""

    __slots__ = ("busy_ns", "idle_ns", "kinds", "pid", "straggles", "timed", "uncertainty_ns")

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.busy_ns = self.idle_ns = self.straggles = 0
        self.kinds: Counter[str] = Counter()
        self.timed = False
        self.uncertainty_ns: int | None = None


class Second:
    """All that was told in one second."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.engine_steps: Counter[str] = Counter()
        self.own_steps: Counter[str] = Counter()
        self.tokens = self.requests = self.outermost_ns = 0
        self.stages: dict[tuple[int, str], Stages] = {}
        self.ranks: dict[int, Rank] = {}


class Tally:
    """Counts for all processes of a session, by when things happened: a viewer that is late counts late, but right.

    Args:
        began_ns: From when on, by the host's monotonic clock.
    """

    def __init__(self, began_ns: int) -> None:
        self._began_ns = began_ns
        self.upto_ns = began_ns
        """All that happened before has come."""
        self._seconds: dict[int, Second] = {}
        self.slowest = Slowest()
        self.hangs = 0
        self.dropped: dict[str, int] = {}
        """Since looking began, by reason."""

    def process(self, hello: Hello) -> ProcessTally:
        """What is told of one process."""
        return ProcessTally(self, hello.pid)

    def second(self, at_ns: int) -> Second:
        """The one in which this instant lies."""
        number = (at_ns - self._began_ns) // _SECOND_NS
        second = self._seconds.get(number)
        if second is None:
            second = self._seconds[number] = Second(number)
            while len(self._seconds) > _KEPT_SECONDS:
                del self._seconds[min(self._seconds)]
        return second

    def window(self) -> tuple[list[Second], float, int]:
        """The last whole seconds of which all has come, or the first as far as it has; how long; and until when."""
        passed_ns = self.upto_ns - self._began_ns
        whole = passed_ns // _SECOND_NS
        if whole < 1:
            first_second = [self._seconds[0]] if 0 in self._seconds else []
            return first_second, max(passed_ns, 1) / _SECOND_NS, self.upto_ns
        first = max(0, whole - WINDOW_SECONDS)
        seconds = [second for number, second in sorted(self._seconds.items()) if first <= number < whole]
        return seconds, float(whole - first), self._began_ns + whole * _SECOND_NS


class ProcessTally:
    """What is told of one process: in the place of the metrics' own counting.

    Args:
        tally: Of all.
        pid: Its process.
    """

    def __init__(self, tally: Tally, pid: int) -> None:
        self._tally = tally
        self._pid = pid
        self._ends_ns: dict[int, int] = {}

    def ran(self, ran: Ran) -> None:
        """A step has run."""
        step, second = ran.step, self._tally.second(ran.step.seen_ns)
        rank = second.ranks.get(step.rank if step.rank >= 0 else -self._pid)
        if rank is None:
            rank = second.ranks[step.rank if step.rank >= 0 else -self._pid] = Rank(self._pid)
        if step.rank >= 0:
            rank.kinds[step.kind] += 1
        elif not step.bare:
            second.own_steps[step.kind or "step"] += 1
        (first_ns, last_ns), on_device = ran.extent, ran.device is not None
        device = -1 if ran.device is None else ran.device
        rank.busy_ns += max(0, last_ns - max(first_ns, self._ends_ns.get(device, first_ns)))
        self._ends_ns[device] = max(last_ns, self._ends_ns.get(device, last_ns))
        rank.idle_ns += ran.idle_ns or 0
        rank.timed = rank.timed or on_device
        for stage, place in zip(step.stages, ran.placed, strict=True):
            key = (step.rank, stage.name)
            stages = second.stages.get(key)
            if stages is None:
                stages = second.stages[key] = Stages()
            stages.add(stage, place)
            if stage.parent < 0:
                second.outermost_ns += stage.duration_ns
            if place.uncertainty_ns is not None:
                rank.uncertainty_ns = place.uncertainty_ns
        self._tally.slowest.ran(ran)

    def scheduled(self, frame: Scheduled) -> None:
        """An engine has scheduled a step, or says that requests have left it."""
        self.drops(frame.dropped)
        if frame.total_tokens:
            second = self._tally.second(frame.scheduled_ns)
            second.engine_steps[frame.kind] += 1
            second.tokens += frame.total_tokens
            second.requests += frame.total_requests
            self._tally.slowest.scheduled(frame)

    def straggled(self, kind: str, skew_ns: int, ran: Ran) -> None:  # noqa: ARG002
        """The others waited for this rank."""
        rank = self._tally.second(ran.step.seen_ns).ranks.setdefault(ran.step.rank, Rank(self._pid))
        rank.straggles += 1

    def drops(self, counts: Mapping[str, int]) -> None:
        """The process has left out so much."""
        if counts:
            add_up(self._tally.dropped, dict(counts))

    def hang(self, frame: Unfinished) -> None:  # noqa: ARG002
        """A stage hangs."""
        self._tally.hangs += 1

    def kept(self, ran: Ran, spans: Sequence[ReadableSpan], reason: str) -> None:
        """A step has become a trace."""

    def request(
        self, reason: str | None, device_ns: int, attributed_ns: int, spans: Sequence[ReadableSpan], unix_ns: int
    ) -> None:
        """A request is over."""


def summary(tally: Tally, rank: int | None = None) -> dict[str, Any]:
    """The figures of the last seconds, as plain values: times in milliseconds, shares from 0 to 1.

    Args:
        tally: What was counted.
        rank: Whose stages; None for all.
    """
    seconds, length, _ = tally.window()
    steps: Counter[str] = Counter()
    for second in seconds:
        steps += second.engine_steps + second.own_steps
    ranks = _ranks(seconds, length)
    if not steps and ranks:  # their engine is on another host: all ranks run the same steps
        steps = max((_kinds(seconds, number) for number in {n for s in seconds for n in s.ranks}), key=Counter.total)
    engine_steps = sum(second.engine_steps.total() for second in seconds)
    return {
        "seconds": length,
        "steps": dict(steps),
        "steps_per_second": {kind: count / length for kind, count in steps.items()},
        "tokens": sum(second.tokens for second in seconds),
        "tokens_per_second": sum(second.tokens for second in seconds) / length,
        "requests_per_step": sum(second.requests for second in seconds) / engine_steps if engine_steps else 0.0,
        "stages": _stages(seconds, length, rank),
        "ranks": ranks,
        "slowest_step": tally.slowest.last_minute(),
        "hangs": tally.hangs,
    }


def _kinds(seconds: Sequence[Second], rank: int) -> Counter[str]:
    kinds: Counter[str] = Counter()
    for second in seconds:
        if rank in second.ranks:
            kinds += second.ranks[rank].kinds
    return kinds


def _stages(seconds: Sequence[Second], length: float, rank: int | None) -> list[dict[str, Any]]:
    together: dict[str, list[Stages]] = {}
    for second in seconds:
        for (whose, name), stages in second.stages.items():
            if rank is None or whose == rank:
                together.setdefault(name, []).append(stages)
    whole_ns = sum(second.outermost_ns for second in seconds) or 1
    rows = [_stage(name, parts, length, whole_ns) for name, parts in together.items()]
    return sorted(rows, key=lambda row: -row["share"])


def _stage(name: str, parts: Sequence[Stages], length: float, whole_ns: int) -> dict[str, Any]:
    durations = sorted(duration for part in parts for duration in part.durations)
    on_device = sum(part.on_device for part in parts)
    launch, device = sum(part.launch_bound for part in parts), sum(part.device_bound for part in parts)
    bound = "host" if not on_device else "unsure"
    if launch or device:
        bound = "launch-bound" if launch > device else "device-bound"
    return {
        "name": name,
        "per_second": len(durations) / length,
        "share": sum(durations) / whole_ns,
        "p50_ms": _quantile(durations, 0.5),
        "p99_ms": _quantile(durations, 0.99),
        "host_ms": sum(part.host_ns for part in parts) / on_device * 1e-6 if on_device else None,
        "device_ms": sum(part.device_ns for part in parts) / on_device * 1e-6 if on_device else None,
        "bound": bound,
    }


def _quantile(durations: Sequence[int], share: float) -> float:
    """In milliseconds, of durations in their order."""
    return durations[min(len(durations) - 1, int(share * len(durations)))] * 1e-6


def _ranks(seconds: Sequence[Second], length: float) -> list[dict[str, Any]]:
    def share(times_ns: Iterable[int]) -> float:
        return min(1.0, sum(times_ns) * 1e-9 / length)

    rows = []
    for number in sorted({number for second in seconds for number in second.ranks}):
        parts = [second.ranks[number] for second in seconds if number in second.ranks]
        timed = any(part.timed for part in parts)
        unsure = [part.uncertainty_ns for part in parts if part.uncertainty_ns is not None]
        rows.append(
            {
                "rank": number if number >= 0 else None,
                "pid": parts[-1].pid,
                "steps_per_second": sum(part.kinds.total() for part in parts) / length,
                "busy": share(part.busy_ns for part in parts),
                "idle": min(1.0, sum(part.idle_ns for part in parts) * 1e-9 / length)
                if timed and number >= 0
                else None,
                "timing": semconv.TIMING_DEVICE if timed else semconv.TIMING_HOST,
                "straggles_per_second": sum(part.straggles for part in parts) / length,
                "clock_uncertainty_us": unsure[-1] * 1e-3 if unsure else None,
            }
        )
    return rows
