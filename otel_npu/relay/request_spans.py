"""The spans of a request that is over: where its time went."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from opentelemetry.sdk.trace import Event

from otel_npu import semconv
from otel_npu.relay.spans import span_context

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.trace import SpanContext

    from otel_npu.relay.engine import StepTimes
    from otel_npu.relay.requests import OpenRequest, Phase

_STAGE_BEFORE, _STAGE_AFTER = semconv.REQUEST_STAGE_DEVICE_TIME.split("<name>")


def request_spans(request: OpenRequest, unix_ns: int) -> list[ReadableSpan]:
    """`queue`, and `prefill` and `decode` where they ran, with the steps and stages below them.

    Args:
        request: The request; it is closed by this.
        unix_ns: Unix time minus the host's monotonic time: one for all, so that they stay together.
    """
    request.close(unix_ns)
    return _RequestSpans(request, unix_ns).spans


class _RequestSpans:
    def __init__(self, request: OpenRequest, unix_ns: int) -> None:
        self._request = request
        self._unix_ns = unix_ns
        self._maker = request.engine.client.assembler.spans
        self._trace_id = int.from_bytes(request.frame.trace_id, "big")
        self._parent = span_context(self._trace_id, request.frame.parent_span_id)
        self.spans: list[ReadableSpan] = []
        ran = [
            (name, phase)
            for name, phase in ((semconv.PREFILL, request.prefill), (semconv.DECODE, request.decode))
            if phase.steps
        ]
        events = self._events([semconv.QUEUE, *(name for name, _ in ran)])
        self._span(semconv.QUEUE, self._queue_times(), {} if ran else _ending(request), events[semconv.QUEUE])
        for name, phase in ran:
            attributes = _phase_attributes(phase)
            if phase is ran[-1][1]:
                attributes.update(_ending(request))
                attributes[semconv.REQUEST_ATTRIBUTED_DEVICE_TIME] = (
                    phase.attributed_ns + request.surplus.attributed_ns
                ) * 1e-9
            context = self._span(name, self._unix(phase.start_ns, phase.end_ns), attributes, events[name])
            if name == semconv.PREFILL:
                for times in phase.listed:
                    self._stages(times, context)
            elif phase.slowest is not None:
                self._slowest(phase.slowest, context)

    def _span(
        self, name: str, times_ns: tuple[int, int], attributes: dict[str, Any], events: list[Event]
    ) -> SpanContext | None:
        context = span_context(self._trace_id, os.urandom(8))
        attributes[semconv.REQUEST_ID] = self._request.frame.request_id
        self.spans.append(self._maker.span(name, context, self._parent, attributes, times_ns, events=events))
        return context

    def _slowest(self, times: StepTimes, parent: SpanContext | None) -> None:
        context = span_context(self._trace_id, os.urandom(8))
        attributes = times.attributes
        if times.kind:
            attributes[semconv.STEP_KIND] = times.kind
        self.spans.append(
            self._maker.span(
                semconv.SLOWEST_STEP, context, parent, attributes, self._unix(times.start_ns, times.end_ns)
            )
        )
        self._stages(times, context)

    def _stages(self, times: StepTimes, parent: SpanContext | None) -> None:
        step, placed = times.ran.step, times.ran.placed
        self.spans += self._maker.stages(step, placed, self._trace_id, parent, self._unix_ns, more=times.attributes)

    def _unix(self, start_ns: int, end_ns: int) -> tuple[int, int]:
        return start_ns + self._unix_ns, end_ns + self._unix_ns

    def _queue_times(self) -> tuple[int, int]:
        """From the arrival to the first scheduling, which may come after the end, or never."""
        request = self._request
        arrived_ns, end = request.frame.arrived_unix_ns, request.end
        at_ns = request.engine_end_ns if request.first_opened_ns is None else request.first_opened_ns
        ends_ns = [] if at_ns is None else [at_ns + self._unix_ns]
        if end is not None:
            ends_ns.append(end.ended_unix_ns)
        return arrived_ns, max(arrived_ns, min(ends_ns))

    def _events(self, names: list[str]) -> dict[str, list[Event]]:
        """The preemptions by the span that has them: of their phase or, if it has none, of the phase before."""
        events: dict[str, list[Event]] = {name: [] for name in names}
        order = (semconv.QUEUE, semconv.PREFILL, semconv.DECODE)
        for at_ns, phase in self._request.preemptions:
            name = [name for name in names if order.index(name) <= order.index(phase)][-1]
            events[name].append(Event(semconv.PREEMPTED, timestamp=at_ns + self._unix_ns))
        return events


def _phase_attributes(phase: Phase) -> dict[str, Any]:
    attributes: dict[str, Any] = {
        f"{_STAGE_BEFORE}{name}{_STAGE_AFTER}": duration_ns * 1e-9 for name, duration_ns in phase.by_stage.items()
    }
    attributes[semconv.RANK] = phase.rank
    attributes[semconv.REQUEST_STEPS] = phase.steps
    attributes[semconv.REQUEST_DEVICE_TIME] = phase.device_ns * 1e-9
    attributes[semconv.REQUEST_ATTRIBUTED_DEVICE_TIME] = phase.attributed_ns * 1e-9
    attributes[semconv.REQUEST_WAIT] = phase.wait_ns * 1e-9
    if phase.listed and phase.steps > len(phase.listed):
        attributes[semconv.REQUEST_UNLISTED_STEPS] = phase.steps - len(phase.listed)
    return attributes


def _ending(request: OpenRequest) -> dict[str, Any]:
    """What the last of a request's spans says of the whole of it."""
    attributes: dict[str, Any] = {}
    if request.end is not None:
        attributes[semconv.REQUEST_FINISH_REASON] = request.end.reason
    if request.untimed:
        attributes[semconv.REQUEST_UNTIMED_STEPS] = request.untimed
    surplus = request.surplus
    if surplus.steps:
        attributes[semconv.REQUEST_SURPLUS_STEPS] = surplus.steps
        attributes[semconv.REQUEST_SURPLUS_DEVICE_TIME] = surplus.device_ns * 1e-9
        attributes[semconv.REQUEST_ATTRIBUTED_DEVICE_TIME] = surplus.attributed_ns * 1e-9
    return attributes
