"""A step of an engine: what the engine and its workers say of it, each in frames of its own."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Protocol

from otel_npu import semconv
from otel_npu.relay.verdicts import straggler

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan

    from otel_npu.relay.client import Client
    from otel_npu.relay.placing import Ran
    from otel_npu.relay.verdicts import Straggler
    from otel_npu.wire.frames import Request, Scheduled, Stage, Updated


class Served(Protocol):
    """A request, as far as a step that serves it knows it."""

    frame: Request

    @property
    def link(self) -> bytes:
        """The span that waits for it, as in frames."""


class StepTimes:
    """When and how long a step ran for the requests that it served: made once for all of them, of one rank's times."""

    __slots__ = (
        "by_stage",
        "device_ns",
        "end_ns",
        "kind",
        "known",
        "number",
        "on_device",
        "ran",
        "start_ns",
        "total_requests",
        "total_tokens",
    )

    def __init__(self, scheduled: Scheduled, ran: Ran) -> None:
        self.number = scheduled.number
        self.kind = scheduled.kind
        self.total_tokens = scheduled.total_tokens
        self.total_requests = scheduled.total_requests
        self.ran = ran
        self.start_ns = ran.start_ns
        self.end_ns = ran.end_ns
        self.on_device, self.by_stage = _device_times(ran.step.stages)
        self.device_ns = sum(self.by_stage.values())
        self.known: dict[Any, Any] = {}
        """What its spans in the traces of requests have in common, by what makes them; made with the first."""

    @property
    def attributes(self) -> dict[str, Any]:
        """Which step it was, and of which rank the times are."""
        return {semconv.STEP_NUMBER: self.number, semconv.RANK: self.ran.step.rank}

    @property
    def timing(self) -> str:
        """By whose clock."""
        return semconv.TIMING_DEVICE if self.on_device else semconv.TIMING_HOST


class Part:
    """What a request had of a step.

    Attributes:
        request: The request.
        step: The step.
        tokens: How many of the step's tokens were for it.
        decode: Whether that belongs to its decode phase.
        outputs: How many output tokens it had after the step; -1 if the step gave it no output.
        last: Whether the engine finished it with this output.
        late: Whether the step was under way when the engine let go of it.
    """

    __slots__ = ("decode", "last", "late", "outputs", "request", "step", "tokens")

    def __init__(self, request: Served, step: EngineStep, tokens: int, *, decode: bool) -> None:
        self.request = request
        self.step = step
        self.tokens = tokens
        self.decode = decode
        self.outputs = -1
        self.last = self.late = False


class EngineStep:
    """A step whose frames may come in any order: a worker's before its engine's.

    Attributes:
        client: Whose step it is: its engine's; None until it is known to have been scheduled.
        scheduled: The engine's first frame of it.
        parts: What requests had of it.
        ranks: Its runs, by rank.
        reason: Why it is kept as a trace; empty as long as it is not.
        unkept: Its runs, and whose each is, as long as it is not.
        times: The run that counts for the requests; None if there was none, or until `settled`.
        updated: The engine's second frame of it, if its output was taken in.
        over: Whether its output was taken in, or never will be.
        deadline: When it is done with, whatever is still missing.
    """

    __slots__ = (
        "client",
        "deadline",
        "over",
        "parts",
        "ranks",
        "reason",
        "scheduled",
        "settled",
        "times",
        "unkept",
        "updated",
    )

    def __init__(self) -> None:
        self.client: Client | None = None
        self.scheduled: Scheduled | None = None
        self.parts: list[Part] = []
        self.ranks: dict[int, Ran] = {}
        self.reason = ""
        self.unkept: list[tuple[Client, Ran]] = []
        self.times: StepTimes | None = None
        self.settled = False
        self.updated: Updated | None = None
        self.over = False
        self.deadline = math.inf

    @property
    def complete(self) -> bool:
        """Whether the step has come from every rank."""
        return self.scheduled is not None and len(self.ranks) >= max(1, self.scheduled.ranks)

    def decisive(self) -> Ran | None:
        """The run of the rank that returns the output; if no rank does, of the lowest, once all have come."""
        for ran in self.ranks.values():
            if ran.step.returns_output:
                return ran
        return self.ranks[min(self.ranks)] if self.complete else None

    def settle(self) -> None:
        """From now on its times are what they are: of the deciding rank or, where it is missing, of the lowest."""
        self.times = self.times_so_far()
        self.settled = True

    def times_so_far(self) -> StepTimes | None:
        """Its times, by what has come until now."""
        if self.settled or self.scheduled is None or not self.ranks:
            return self.times
        return StepTimes(self.scheduled, self.decisive() or self.ranks[min(self.ranks)])

    def span(self, unix_ns: int) -> ReadableSpan:
        """The span of a step that is kept as a trace. It ends no earlier than what its ranks say of it.

        Args:
            unix_ns: Unix time minus the host's monotonic time.
        """
        assert self.client is not None
        assert self.scheduled is not None
        scheduled, assembler = self.scheduled, self.client.assembler
        ends_ns = [ran.end_ns + ran.unix_ns for ran in self.ranks.values()]
        ends_ns.append((scheduled.scheduled_ns if self.updated is None else self.updated.closed_ns) + unix_ns)
        attributes: dict[str, Any] = {
            semconv.STEP_NUMBER: scheduled.number,
            semconv.STEP_KIND: scheduled.kind,
            **self.size,
            semconv.STEP_RANKS: scheduled.ranks,
            semconv.TIMING: semconv.TIMING_HOST,
            semconv.SAMPLED_REASON: self.reason,
            **self._gained(),
        }
        if self.times is not None and self.times.ran.idle_ns is not None:
            attributes[semconv.STEP_IDLE] = semconv.seconds(self.times.ran.idle_ns)
        late = self.straggler()
        if late is not None:
            attributes[semconv.STEP_STRAGGLER], attributes[semconv.STEP_SKEW] = late.rank, semconv.seconds(late.skew_ns)
        for reason, count in assembler.take_drops().items():
            attributes[semconv.DROPPED_PREFIX + reason] = count
        return assembler.spans.span(
            semconv.ENGINE_STEP,
            (scheduled.trace_id, scheduled.span_id, b""),
            attributes,
            (scheduled.opened_ns + unix_ns, max(ends_ns)),
            links=assembler.spans.links(dict.fromkeys(part.request.link for part in self.parts)),
        )

    @property
    def size(self) -> dict[str, Any]:
        """How much it was, as far as its engine has told."""
        scheduled = self.scheduled
        if scheduled is None:
            return {}
        return {semconv.STEP_REQUESTS: scheduled.total_requests, semconv.STEP_TOKENS: scheduled.total_tokens}

    def _gained(self) -> dict[str, int]:
        """What need not be computed, because a cache had it, or because a draft was right."""
        scheduled, updated = self.scheduled, self.updated
        assert scheduled is not None
        gained: dict[str, int] = {}
        if scheduled.total_cached or scheduled.total_fetched:
            gained[semconv.STEP_CACHED_TOKENS] = scheduled.total_cached
            gained[semconv.STEP_FETCHED_TOKENS] = scheduled.total_fetched
        if updated is not None and updated.total_drafted:
            gained[semconv.STEP_DRAFTED_TOKENS] = updated.total_drafted
            gained[semconv.STEP_ACCEPTED_TOKENS] = updated.total_accepted
        return gained

    def straggler(self) -> Straggler | None:
        """The rank for which others waited, once all have told; None if there is none, or it can't be told."""
        scheduled = self.scheduled
        if scheduled is None or not self.complete:
            return None
        return straggler(self.ranks.values(), max(1, scheduled.ranks // scheduled.pipeline))

    def release(self) -> None:
        """Let go of what only its own span was made of; requests may hold on to its times."""
        self.parts, self.ranks, self.unkept = [], {}, []


def _device_times(stages: list[Stage]) -> tuple[bool, dict[str, int]]:
    """Whether the device timed any, and nanoseconds by name of the outermost that it timed, or else of the host's."""
    device: dict[str, int] = {}
    host: dict[str, int] = {}
    covered: list[bool] = []
    """Of each stage, whether its time is in that of one that the device timed."""
    for stage in stages:
        inside = stage.parent >= 0 and covered[stage.parent]
        on_device = stage.device_ns is not None
        covered.append(inside or on_device)
        if on_device and not inside:
            device[stage.name] = device.get(stage.name, 0) + stage.duration_ns
        elif stage.parent < 0:
            host[stage.name] = host.get(stage.name, 0) + stage.duration_ns
    return bool(device), device or host
