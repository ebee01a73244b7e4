"""What steps did for a request: put together while it runs, in bounded memory."""

from __future__ import annotations

import heapq
import itertools
import math
import operator
from typing import TYPE_CHECKING, Final, NamedTuple

from otel_npu import semconv
from otel_npu.relay.engine_step import Part

if TYPE_CHECKING:
    from otel_npu.relay.client import Client
    from otel_npu.relay.engine_step import EngineStep, StepTimes
    from otel_npu.wire.frames import Request, RequestEnd

ABORT: Final = "abort"
RECENT_STEPS: Final = 64
"""So many of a request's steps stay apart at most until it ends: which of them were surplus is only known then."""
_FOLDED_TOGETHER: Final = 16
"""So many are put into its phases at once: all but the first finds its code in the processor's caches."""
SHOWN_PREFILL_STEPS: Final = 64
SHOWN_DECODE_STEPS: Final = 3
"""So many steps of a phase are spans, the slowest ones."""
DETAIL_STEPS: Final = 256
"""The same of each phase where detail was asked for: of most requests that is every step."""
MAX_STAGE_NAMES: Final = 128
"""Of so many stages a phase tells the times apart."""
_MAX_EVENTS: Final = 128
_is_settled: Final = operator.attrgetter("step.settled")
_MAX_LOADS: Final = 16


class ShownStep(NamedTuple):
    """A step of a phase that is to be a span.

    Attributes:
        duration_ns: How long it took.
        number: Which of the phase's steps it is, from 1.
        times: When it ran.
        tokens: How many of its tokens were the request's.
        device_before_ns: How long the phase's steps before it took on the device.
    """

    duration_ns: int
    number: int
    times: StepTimes
    tokens: int
    device_before_ns: int


class Phase:
    """Some of a request's steps as one. Times in nanoseconds.

    Args:
        most_shown: How many steps are kept to be shown: the slowest.
    """

    __slots__ = (
        "_most_shown",
        "_slowest",
        "attributed_ns",
        "by_stage",
        "device_ns",
        "end_ns",
        "on_device",
        "rank",
        "start_ns",
        "steps",
        "wait_ns",
    )

    def __init__(self, most_shown: int = 0) -> None:
        self._most_shown = most_shown
        self._slowest: list[ShownStep] = []
        """A heap: the quickest of them is the first."""
        self.steps = self.start_ns = self.end_ns = self.device_ns = self.wait_ns = 0
        self.attributed_ns = 0.0
        self.by_stage: dict[str, int] = {}
        self.on_device = True
        """Whether the device timed all of its steps."""
        self.rank = -1

    def add(self, times: StepTimes, tokens: int) -> None:
        """One more step, in which so many tokens were the request's."""
        start_ns, end_ns = times.start_ns, times.end_ns
        if not self.steps:
            self.start_ns = start_ns
        elif start_ns > self.end_ns:
            self.wait_ns += start_ns - self.end_ns
        self.end_ns = max(self.end_ns, end_ns)
        self.steps += 1
        self.rank = times.ran.step.rank
        self.on_device = self.on_device and times.on_device
        if len(self._slowest) < self._most_shown:
            heapq.heappush(self._slowest, self._shown(times, tokens))
        elif self._slowest and end_ns - start_ns > self._slowest[0].duration_ns:
            heapq.heapreplace(self._slowest, self._shown(times, tokens))
        self.device_ns += times.device_ns
        self.attributed_ns += times.device_ns * tokens / times.total_tokens
        by_stage = self.by_stage
        for name, duration_ns in times.by_stage.items():
            if name in by_stage:
                by_stage[name] += duration_ns
            elif len(by_stage) < MAX_STAGE_NAMES:
                by_stage[name] = duration_ns

    @property
    def timing(self) -> str:
        """By whose clock."""
        return semconv.TIMING_DEVICE if self.on_device else semconv.TIMING_HOST

    @property
    def shown(self) -> list[ShownStep]:
        """The steps to show, in the order in which they ran."""
        return sorted(self._slowest, key=lambda step: step.number)

    def _shown(self, times: StepTimes, tokens: int) -> ShownStep:
        return ShownStep(times.end_ns - times.start_ns, self.steps, times, tokens, self.device_ns)


class Load:
    """A request's wait for KV cache from elsewhere.

    Attributes:
        start_ns: When the engine asked for it.
        tokens: Of how many tokens.
        connector: By which connector.
        end_ns: When it had arrived, if it has.
        failed: Whether not all of it came.
    """

    __slots__ = ("connector", "end_ns", "failed", "start_ns", "tokens")

    def __init__(self, start_ns: int, tokens: int, connector: str) -> None:
        self.start_ns = start_ns
        self.tokens = tokens
        self.connector = connector
        self.end_ns: int | None = None
        self.failed = False


class OpenRequest:
    """A request from its arrival in an engine to its end.

    Attributes:
        frame: What the engine announced it with.
        client: The process of its engine.
        deadline: When it is done with, whatever is still missing; never before an end is known.
        end: What the front end said of its end.
        engine_end_ns: When the engine was done with it, if it is.
        first_opened_ns: When the first scheduling of it began, if one did.
        events: What happened to it: when, what, and in which phase.
        loads: Its waits for KV cache from elsewhere.
        cached_tokens: How many tokens of its prompt the engine's cache had; None before it is scheduled.
        fetched_tokens: How many came from elsewhere.
        drafted_tokens: How many were drafted for it.
        accepted_tokens: How many of them were accepted.
        prefill: Its prefill steps.
        decode: Its decode steps.
        surplus: Its steps that were not for it any more.
        untimed: How many of its steps have no times.
        forgotten: Whether it is no longer followed.
    """

    __slots__ = (
        "_decoding",
        "_folded_outputs",
        "_outputs",
        "_parts",
        "_unsettled",
        "accepted_tokens",
        "cached_tokens",
        "client",
        "deadline",
        "decode",
        "drafted_tokens",
        "end",
        "engine_end_ns",
        "events",
        "fetched_tokens",
        "first_opened_ns",
        "forgotten",
        "frame",
        "loads",
        "prefill",
        "surplus",
        "untimed",
    )

    def __init__(self, client: Client, frame: Request) -> None:
        self.frame = frame
        self.client = client
        self.deadline = math.inf
        self.end: RequestEnd | None = None
        self.engine_end_ns: int | None = None
        self.first_opened_ns: int | None = None
        self.events: list[tuple[int, str, str]] = []
        self.loads: list[Load] = []
        self.cached_tokens: int | None = None
        self.fetched_tokens = self.drafted_tokens = self.accepted_tokens = 0
        self.prefill = Phase(DETAIL_STEPS if frame.detail else SHOWN_PREFILL_STEPS)
        self.decode = Phase(DETAIL_STEPS if frame.detail else SHOWN_DECODE_STEPS)
        self.surplus = Phase()
        self.untimed = 0
        self.forgotten = False
        self._parts: list[Part] = []
        """Its latest steps; those before them are in the phases already."""
        self._unsettled = 0
        self._outputs = 0
        self._folded_outputs = -1
        self._decoding = False

    @property
    def link(self) -> bytes:
        """The span that waits for it, as in frames."""
        return self.frame.trace_id + self.frame.parent_span_id + b"\x01"

    @property
    def ending(self) -> bool:
        """Whether an end of it is known."""
        return self.end is not None or self.engine_end_ns is not None

    @property
    def complete(self) -> bool:
        """Whether all is known that there is to know."""
        return self.end is not None and self.engine_end_ns is not None and not self._unsettled

    @property
    def device_ns(self) -> int:
        """How long its steps took on the device."""
        return self.prefill.device_ns + self.decode.device_ns

    @property
    def attributed_ns(self) -> int:
        """Its share of that, by tokens, and of its steps that were surplus."""
        return round(sum(phase.attributed_ns for phase in (self.prefill, self.decode, self.surplus)))

    def take_part(self, step: EngineStep, opened_ns: int, tokens: int, *, prefill: bool) -> Part:
        """It is in a step that was scheduled now."""
        if self.first_opened_ns is None:
            self.first_opened_ns = opened_ns
        # What is computed again after a preemption is no prefill any more.
        self._decoding = self._decoding or not prefill or self._outputs > 0
        part = Part(self, step, tokens, decode=self._decoding)
        self._parts.append(part)
        self._unsettled += 1
        return part

    def settled(self) -> None:
        """The times of one more of its steps are known."""
        self._unsettled -= 1
        if len(self._parts) < RECENT_STEPS or self.ending:
            return
        folded = [*itertools.takewhile(_is_settled, self._parts[:_FOLDED_TOGETHER])]
        del self._parts[: len(folded)]
        for part in folded:
            self._folded_outputs = max(self._folded_outputs, part.outputs)
            self._add(part)

    def output(self, span_id: bytes, new_tokens: int) -> None:
        """The step with this span id gave it so many tokens."""
        self._outputs += new_tokens
        part = self._part(span_id)
        if part is not None:
            part.outputs = self._outputs

    def finished(self, span_id: bytes, at_ns: int) -> None:
        """The engine has finished it with the output of this step."""
        self.engine_end_ns = at_ns
        part = self._part(span_id)
        if part is not None:
            part.last = True

    def dismissed(self, at_ns: int) -> None:
        """The engine has let go of it without an output."""
        self.engine_end_ns = at_ns
        for part in self._parts:
            part.late = part.outputs < 0 and part.step.updated is None

    def preempted(self, at_ns: int) -> None:
        """It was put back into the queue."""
        self._happened(at_ns, semconv.PREEMPTED)

    def found(self, cached_tokens: int, fetched_tokens: int) -> None:
        """It was scheduled for the first time, and so much of its prompt was there already."""
        self.cached_tokens, self.fetched_tokens = cached_tokens, fetched_tokens

    def drafts_verified(self, drafted_tokens: int, accepted_tokens: int) -> None:
        """A step verified drafts of it."""
        self.drafted_tokens += drafted_tokens
        self.accepted_tokens += accepted_tokens

    def loading(self, at_ns: int, tokens: int, connector: str) -> None:
        """It waits for KV cache from elsewhere."""
        if len(self.loads) < _MAX_LOADS:
            self.loads.append(Load(at_ns, tokens, connector))

    def load_failed(self, at_ns: int) -> None:
        """What was to come from elsewhere did not."""
        if self._load is None:
            self._happened(at_ns, semconv.KV_LOAD_FAILED)
        else:
            self._load.failed = True

    def loaded(self, at_ns: int) -> None:
        """It waits no longer for KV cache."""
        if self._load is not None:
            self._load.end_ns = at_ns

    @property
    def _load(self) -> Load | None:
        """What it waits for."""
        return self.loads[-1] if self.loads and self.loads[-1].end_ns is None else None

    def _happened(self, at_ns: int, what: str) -> None:
        if len(self.events) < _MAX_EVENTS:
            phase = semconv.DECODE if self._decoding else semconv.PREFILL
            self.events.append((at_ns, what, phase if self.first_opened_ns is not None else semconv.QUEUE))

    def close(self, unix_ns: int) -> None:
        """It is over: what is still apart goes into its phases, or is surplus.

        Args:
            unix_ns: Unix time minus the host's monotonic time.
        """
        for part, surplus in zip(self._parts, self._surplus(unix_ns), strict=True):
            if not surplus:
                self._add(part)
                continue
            times = part.step.times_so_far()
            if times is None:
                self.surplus.steps += 1
            else:
                self.surplus.add(times, part.tokens)
        self.let_go()

    def let_go(self) -> None:
        """Its steps, which refer to it, are needed no more: the garbage collector need not come for them."""
        self._parts.clear()

    def _surplus(self, unix_ns: int) -> list[bool]:
        """Of each latest step, whether the request was over before it."""
        parts, end = self._parts, self.end
        if end is not None and end.reason == ABORT:
            ends_ns = [None if times is None else times.end_ns for times in (p.step.times_so_far() for p in parts)]
            return [end_ns is not None and end_ns + unix_ns > end.ended_unix_ns for end_ns in ends_ns]
        last = None
        if end is not None:
            if 0 <= end.output_tokens <= self._folded_outputs:
                last = -1
            else:
                reached = (i for i, part in enumerate(parts) if 0 <= part.outputs >= end.output_tokens)
                last = next(reached, None)
        if last is None:
            last = next((i for i, part in enumerate(parts) if part.last), None)
        if last is None:
            return [part.late for part in parts]
        return [i > last for i in range(len(parts))]

    def _add(self, part: Part) -> None:
        times = part.step.times_so_far()
        if times is None:
            self.untimed += 1
        else:
            (self.decode if part.decode else self.prefill).add(times, part.tokens)

    def _part(self, span_id: bytes) -> Part | None:
        for part in reversed(self._parts):  # one of the last, as steps overlap little
            scheduled = part.step.scheduled
            if scheduled is not None and scheduled.span_id == span_id:
                return part
        return None
