"""The spans of a request that is over: where its time went."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from opentelemetry.sdk.trace import Event

from otel_npu import semconv
from otel_npu.ids import new_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from opentelemetry.sdk.trace import ReadableSpan

    from otel_npu.relay.client import Client
    from otel_npu.relay.engine_step import StepTimes
    from otel_npu.relay.requests import Load, OpenRequest, Phase
    from otel_npu.relay.spans import SpanMaker
    from otel_npu.wire.frames import Request, Stage, Transfers

OMITTED_SHARE: Final = 0.05
"""A stage that the host alone timed, and that is less of its step, has no span in a request's trace."""

_STAGE_BEFORE, _STAGE_AFTER = semconv.REQUEST_STAGE_DEVICE_TIME.split("<name>")
_STEP_NAMES: Final = {semconv.PREFILL: semconv.PREFILL_STEP, semconv.DECODE: semconv.DECODE_STEP}


def request_spans(request: OpenRequest, unix_ns: int) -> list[ReadableSpan]:
    """`queue`, `kv_load`, and `prefill` and `decode` where they ran, with the steps and stages below them.

    What is inside a span comes before it: when the last has arrived somewhere, everything has.

    Args:
        request: The request; it is closed by this.
        unix_ns: Unix time minus the host's monotonic time: one for all, so that they stay together.
    """
    request.close(unix_ns)
    return _RequestSpans(request, unix_ns).spans


def send_span(client: Client, frame: Request, start_ns: int, sent: Transfers, unix_ns: int) -> ReadableSpan:
    """`kv_send` of a request whose KV cache somebody else has fetched.

    Args:
        client: The process of the request's engine.
        frame: The request.
        start_ns: When it was over.
        sent: The frame that said that its blocks are free.
        unix_ns: Unix time minus the host's monotonic time.
    """
    attributes = {
        semconv.REQUEST_ID: frame.request_id,
        semconv.TIMING: semconv.TIMING_HOST,
        semconv.KV_CONNECTOR: sent.connector,
    }
    if frame.response_id:
        attributes[semconv.RESPONSE_ID] = frame.response_id
    return client.assembler.spans.span(
        semconv.KV_SEND,
        (frame.trace_id, new_bytes(8), frame.parent_span_id),
        attributes,
        (start_ns + unix_ns, sent.at_ns + unix_ns),
    )


class _RequestSpans:
    def __init__(self, request: OpenRequest, unix_ns: int) -> None:
        self._request = request
        self._unix_ns = unix_ns
        self._maker = request.client.assembler.spans
        self._trace_id = request.frame.trace_id
        self.spans: list[ReadableSpan] = []
        ran = [
            (name, phase)
            for name, phase in ((semconv.PREFILL, request.prefill), (semconv.DECODE, request.decode))
            if phase.steps
        ]
        events = self._events([semconv.QUEUE, *(name for name, _ in ran)])
        queue = {semconv.TIMING: semconv.TIMING_HOST, **({} if ran else _ending(request))}
        self._top(semconv.QUEUE, new_bytes(8), self._queue_times(), queue, events[semconv.QUEUE])
        for load in request.loads:
            self._load(load)
        for name, phase in ran:
            attributes = _phase_attributes(phase)
            if phase is ran[0][1]:
                attributes.update(_found(request))
            if phase is ran[-1][1]:
                attributes.update(_ending(request))
                attributes[semconv.REQUEST_ATTRIBUTED_DEVICE_TIME] = semconv.seconds(
                    phase.attributed_ns + request.surplus.attributed_ns
                )
            own_id = new_bytes(8)
            attributes.update(self._inside(name, phase, own_id))
            self._top(name, own_id, self._unix(phase.start_ns, phase.end_ns), attributes, events[name])

    def _top(
        self,
        name: str,
        own_id: bytes,
        times_ns: tuple[int, int],
        attributes: dict[str, Any],
        events: Sequence[Event] = (),
        error: str | None = None,
    ) -> None:
        """A span right below the request."""
        frame = self._request.frame
        attributes[semconv.REQUEST_ID] = frame.request_id
        if frame.response_id:
            attributes[semconv.RESPONSE_ID] = frame.response_id
        ids = self._trace_id, own_id, frame.parent_span_id
        self.spans.append(self._maker.span(name, ids, attributes, times_ns, events=events, error=error))

    def _load(self, load: Load) -> None:
        """A wait for KV cache; one that was not over ended with the request, and says how that ended."""
        end = self._request.end
        error = semconv.KV_LOAD_FAILED if load.failed else None
        if load.end_ns is None:
            error = error or ("unfinished" if end is None else end.reason)
            ended_ns = self._ended_ns()
        else:
            ended_ns = load.end_ns + self._unix_ns
        attributes = {
            semconv.TIMING: semconv.TIMING_HOST,
            semconv.KV_TOKENS: load.tokens,
            semconv.KV_CONNECTOR: load.connector,
        }
        times_ns = load.start_ns + self._unix_ns, ended_ns
        self._top(semconv.KV_LOAD, new_bytes(8), times_ns, attributes, error=error)

    def _inside(self, name: str, phase: Phase, phase_id: bytes) -> dict[str, Any]:
        """What is in a phase: its only step's stages, or spans of its steps; what the phase has to say of them."""
        shown = phase.shown
        if phase.steps == 1:
            return self._stages(shown[0].times, phase_id).omitted
        done, device_ns, end_ns = 0, 0, phase.start_ns
        for step in shown:
            times = step.times
            self._others(
                phase, step.number - 1 - done, step.device_before_ns - device_ns, (end_ns, times.start_ns), phase_id
            )
            done, device_ns, end_ns = step.number, step.device_before_ns + times.device_ns, times.end_ns
            own_id = new_bytes(8)
            attributes = self._stages(times, own_id).of_step(times, step.tokens)
            ids, span_times_ns = (self._trace_id, own_id, phase_id), self._unix(times.start_ns, times.end_ns)
            self.spans.append(self._maker.span(_STEP_NAMES[name], ids, attributes, span_times_ns))
        self._others(phase, phase.steps - done, phase.device_ns - device_ns, (end_ns, phase.end_ns), phase_id)
        others = phase.steps - len(shown)
        return {semconv.REQUEST_OTHER_STEPS: others} if others else {}

    def _others(self, phase: Phase, steps: int, device_ns: int, times_ns: tuple[int, int], parent_id: bytes) -> None:
        """One span in the place of steps that have none: the phase has no hole that looks as if data were missing."""
        if not steps:
            return
        attributes = {
            semconv.REQUEST_STEPS: steps,
            semconv.REQUEST_DEVICE_TIME: semconv.seconds(device_ns),
            semconv.TIMING: phase.timing,
        }
        ids = self._trace_id, new_bytes(8), parent_id
        self.spans.append(self._maker.span(semconv.OTHER_STEPS, ids, attributes, self._unix(*times_ns)))

    def _stages(self, times: StepTimes, parent_id: bytes) -> _Known:
        """The stages of a step but those that are noise; what there is to say of it."""
        known = times.known.get(self._maker)
        if known is None:
            known = times.known[self._maker] = _Known(self._maker, times)
        self.spans += known.stages.within(self._trace_id, parent_id, self._unix_ns)
        return known

    def _unix(self, start_ns: int, end_ns: int) -> tuple[int, int]:
        return start_ns + self._unix_ns, end_ns + self._unix_ns

    def _queue_times(self) -> tuple[int, int]:
        """From the arrival to the first scheduling, which may come after the end, or never."""
        request = self._request
        arrived_ns = request.frame.arrived_unix_ns
        starts_ns = [load.start_ns for load in request.loads[:1]]
        if request.first_opened_ns is not None:
            starts_ns.append(request.first_opened_ns)
        ends_ns = [start_ns + self._unix_ns for start_ns in starts_ns]
        return arrived_ns, max(arrived_ns, min([self._ended_ns(), *ends_ns]))

    def _ended_ns(self) -> int:
        """When the request was over for whoever knew it first."""
        request, ends_ns = self._request, []
        if request.end is not None:
            ends_ns.append(request.end.ended_unix_ns)
        if request.engine_end_ns is not None:
            ends_ns.append(request.engine_end_ns + self._unix_ns)
        return min(ends_ns)

    def _events(self, names: list[str]) -> dict[str, list[Event]]:
        """What happened, by the span that has it: of its phase or, if there is none, of the phase before."""
        events: dict[str, list[Event]] = {name: [] for name in names}
        order = (semconv.QUEUE, semconv.PREFILL, semconv.DECODE)
        for at_ns, what, phase in self._request.events:
            name = [name for name in names if order.index(name) <= order.index(phase)][-1]
            events[name].append(Event(what, timestamp=at_ns + self._unix_ns))
        return events


class _Known:
    """What the spans of a step say in all requests that show it, which may be hundreds.

    Args:
        maker: Makes their spans.
        times: The step.
    """

    def __init__(self, maker: SpanMaker, times: StepTimes) -> None:
        stages = times.ran.step.stages
        kept = _kept(stages, (times.end_ns - times.start_ns) * OMITTED_SHARE)
        omitted_ns = sum(
            stage.duration_ns
            for stage, keep in zip(stages, kept, strict=True)
            if not keep and (stage.parent < 0 or kept[stage.parent])
        )
        self.stages = maker.stages(times.ran, more=times.attributes, kept=kept)
        self.omitted = {semconv.OMITTED_HOST_TIME: semconv.seconds(omitted_ns)} if omitted_ns else {}
        self._maker = maker
        self._of_step: dict[int, Any] = {}

    def of_step(self, times: StepTimes, tokens: int) -> Any:
        """What the span of the step says to requests that had so many of its tokens."""
        known = self._of_step.get(tokens)
        if known is not None:
            return known
        attributes = {
            **times.attributes,
            semconv.STEP_TOKENS: times.total_tokens,
            semconv.STEP_REQUESTS: times.total_requests,
            semconv.REQUEST_STEP_TOKENS: tokens,
            semconv.TIMING: times.timing,
            **self.omitted,
        }
        if times.kind:
            attributes[semconv.STEP_KIND] = times.kind
        known = self._of_step[tokens] = self._maker.shared(attributes)
        return known


def _kept(stages: list[Stage], least_ns: float) -> list[bool]:
    """Of each stage, whether it has a span: the device timed it, it is long or failed, or it is round one that has."""
    kept = [stage.device_ns is not None or stage.duration_ns >= least_ns or stage.error is not None for stage in stages]
    for index in reversed(range(len(stages))):  # what is inside a stage comes after it
        if kept[index] and stages[index].parent >= 0:
            kept[stages[index].parent] = True
    return kept


def _phase_attributes(phase: Phase) -> dict[str, Any]:
    attributes: dict[str, Any] = {
        f"{_STAGE_BEFORE}{name}{_STAGE_AFTER}": semconv.seconds(duration_ns)
        for name, duration_ns in phase.by_stage.items()
    }
    attributes[semconv.RANK] = phase.rank
    attributes[semconv.TIMING] = phase.timing
    attributes[semconv.REQUEST_STEPS] = phase.steps
    attributes[semconv.REQUEST_DEVICE_TIME] = semconv.seconds(phase.device_ns)
    attributes[semconv.REQUEST_ATTRIBUTED_DEVICE_TIME] = semconv.seconds(phase.attributed_ns)
    attributes[semconv.REQUEST_WAIT] = semconv.seconds(phase.wait_ns)
    return attributes


def _found(request: OpenRequest) -> dict[str, Any]:
    """How much of the prompt was not to be computed."""
    if request.cached_tokens is None:
        return {}
    return {
        semconv.REQUEST_CACHED_TOKENS: request.cached_tokens + request.fetched_tokens,
        semconv.REQUEST_FETCHED_TOKENS: request.fetched_tokens,
    }


def _ending(request: OpenRequest) -> dict[str, Any]:
    """What the last of a request's spans says of the whole of it."""
    attributes: dict[str, Any] = {}
    if request.end is not None:
        attributes[semconv.REQUEST_FINISH_REASON] = request.end.reason
    if request.drafted_tokens:
        attributes[semconv.REQUEST_DRAFTED_TOKENS] = request.drafted_tokens
        attributes[semconv.REQUEST_ACCEPTED_TOKENS] = request.accepted_tokens
    if request.untimed:
        attributes[semconv.REQUEST_UNTIMED_STEPS] = request.untimed
    surplus = request.surplus
    if surplus.steps:
        attributes[semconv.REQUEST_SURPLUS_STEPS] = surplus.steps
        attributes[semconv.REQUEST_SURPLUS_DEVICE_TIME] = semconv.seconds(surplus.device_ns)
        attributes[semconv.REQUEST_ATTRIBUTED_DEVICE_TIME] = semconv.seconds(surplus.attributed_ns)
    return attributes
