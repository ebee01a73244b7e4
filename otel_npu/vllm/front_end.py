"""The front end: each request's trace is chosen when it arrives, and vLLM's own span of it gets the ids chosen then.

vLLM makes `llm_request` only when a request finishes. Spans that are to be its children have to know its id long
before: it is chosen at arrival, travels with the trace headers that vLLM passes on to its engine anyway, and is given
to the span when vLLM makes it.
"""

from __future__ import annotations

import contextvars
import os
import time
from typing import TYPE_CHECKING, Any, Final

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from otel_npu import semconv
from otel_npu.capture.context import SAMPLED, header_text
from otel_npu.ids import new_bytes
from otel_npu.vllm import chosen, tracing
from otel_npu.vllm.arrival import KEY, Announced, Arrival
from otel_npu.wire import frames

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from otel_npu.capture.recorder import Recorder

_ATTRIBUTE: Final = "_otel_npu_arrival"
_GIVES_IDS: Final = "_otel_npu_gives_ids"
_MAX_ID: Final = 1024  # characters of a request's id
_LLM_REQUEST: Final = "llm_request"
_ABORT: Final = "abort"
_ERROR: Final = "error"
_propagator: Final = TraceContextTextMapPropagator()


# Arrival.


def around_add_request(add_request: Callable[..., Any]) -> Callable[..., Any]:
    """`OutputProcessor.add_request`, which sees every request under its final id, just before the engine does."""

    def call(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        arrival = _arrive(self, request)
        result = add_request(self, request, *args, **kwargs)
        if arrival is not None:
            _remember(self, request, arrival)
        return result

    return call


@tracing.guarded
def _arrive(processor: Any, request: Any) -> Arrival | None:
    recorder = _recorder(processor)
    if recorder is None or recorder.settings.request_spans == "off":
        return None
    if not hasattr(request, "trace_headers"):  # before vLLM traced requests at all
        return None
    if getattr(request, "resumable", False) or request.request_id in processor.request_states:
        return None  # a session with inputs in a stream: vLLM says of each of its parts that it is finished
    given = request.trace_headers or _callers_headers.get() or {}
    headers = {header_text(name): header_text(value) for name, value in given.items()}
    headers.pop(KEY, None)  # of this one alone, not of another sequence of the same call
    maker = _maker(processor) if _vllm_traces(processor) and _gives_ids(processor) else None
    arrival = _choose(request, headers, maker)
    if arrival.announced is not None:
        request.trace_headers = {**headers, KEY: arrival.announced.header()}
    return arrival


@tracing.guarded
def _remember(processor: Any, request: Any, arrival: Arrival) -> None:
    setattr(processor.request_states[request.request_id], _ATTRIBUTE, arrival)


def _choose(request: Any, headers: dict[str, str], maker: Any) -> Arrival:
    if not headers:
        headers.update(_ambient_headers())
    parent = _propagator.extract(headers, Context()) if headers else Context()
    span_context = trace.get_current_span(parent).get_span_context()
    key = new_bytes(8)
    trace_id, parent_span_id, sampling = span_context.trace_id, key, None
    if maker is not None:
        if not span_context.is_valid:
            trace_id = int.from_bytes(new_bytes(16), "big")
        sampling = _verdict(maker, parent, trace_id)
        sampled = sampling is None or sampling.decision.is_sampled()
    else:
        parent_span_id = span_context.span_id.to_bytes(8, "big")
        sampled = span_context.is_valid and bool(span_context.trace_flags & SAMPLED) and not _always_off()
    given = str(getattr(request, "external_req_id", None) or request.request_id)
    request_id = given[:_MAX_ID].encode(errors="replace").decode()  # as long as a client likes, and whatever it likes
    told = Announced(key, trace_id.to_bytes(16, "big"), parent_span_id, request_id) if sampled else None
    return Arrival(told, parent, sampling, int(request.arrival_time * 1e9))


def _gives_ids(processor: Any) -> bool:
    """Whether vLLM's span of a request will have the id chosen here: else nothing can be below it."""
    return hasattr(getattr(type(processor), "do_tracing", None), _GIVES_IDS)


def _ambient_headers() -> dict[str, str]:
    """The parent of a request that brings none, as vLLM will look for it: an active span, or the environment."""
    headers: dict[str, str] = {}
    if trace.get_current_span().get_span_context().is_valid:
        _propagator.inject(headers)
        return headers
    for name in ("traceparent", "tracestate"):
        value = os.environ.get(name, os.environ.get(name.upper()))
        if value:
            headers[name] = value
    return headers


def _vllm_traces(processor: Any) -> bool:
    enabled = getattr(processor, "tracing_enabled", None)
    return getattr(processor, "tracer", None) is not None if enabled is None else bool(enabled)


def _maker(processor: Any) -> Any:
    """What makes vLLM's span of a request: the provider, by a new tracer each time; to 0.13 one tracer, made once."""
    return getattr(processor, "tracer", None) or trace.get_tracer_provider()


def _verdict(maker: Any, parent: Context, trace_id: int) -> Any:
    """What the sampler says: asked now, and held to when vLLM makes the span."""
    sampler = getattr(maker, "sampler", None)
    return None if sampler is None else sampler.should_sample(parent, trace_id, _LLM_REQUEST, trace.SpanKind.SERVER)


def _always_off() -> bool:
    return os.environ.get("OTEL_TRACES_SAMPLER", "").strip().lower() == "always_off"


_callers_headers: contextvars.ContextVar[Mapping[str, str] | None] = contextvars.ContextVar(
    "otel_npu_callers_headers", default=None
)


def around_generate(add_request: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """`AsyncLLM.add_request`, which drops the caller's trace headers where vLLM doesn't trace."""

    async def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        token = _callers_headers.set(kwargs.get("trace_headers"))
        try:
            return await add_request(self, *args, **kwargs)
        finally:
            _callers_headers.reset(token)

    return call


# The end.


def around_finished(update_stats_from_finished: Callable[..., Any]) -> Callable[..., Any]:
    """`OutputProcessor._update_stats_from_finished`: the request has its last output."""

    def call(self: Any, req_state: Any, finish_reason: Any, *args: Any, **kwargs: Any) -> Any:
        result = update_stats_from_finished(self, req_state, finish_reason, *args, **kwargs)
        _end(self, req_state, str(finish_reason), time.time_ns())
        return result

    return call


def around_tracing(do_tracing: Callable[..., Any]) -> Callable[..., Any]:
    """`OutputProcessor.do_tracing`: vLLM makes `llm_request`, with the ids and the verdict of its arrival."""

    def call(self: Any, engine_core_output: Any, req_state: Any, *args: Any, **kwargs: Any) -> Any:
        arrival = _arrival_of(req_state)
        if arrival is None:
            return do_tracing(self, engine_core_output, req_state, *args, **kwargs)
        with chosen.ids(_maker(self), arrival):
            return do_tracing(self, engine_core_output, req_state, *args, **kwargs)

    setattr(call, _GIVES_IDS, True)
    return call


def around_abort(abort_requests: Callable[..., Any]) -> Callable[..., Any]:
    """`OutputProcessor.abort_requests`: vLLM makes no span of a request that was aborted, so it is made here."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        states = _states(self)
        aborted = abort_requests(self, *args, **kwargs)
        _aborted(self, states, aborted)
        return aborted

    return call


@tracing.guarded
def _states(processor: Any) -> dict[str, Any]:
    return dict(processor.request_states)  # whom an id stands for is known to vLLM alone


@tracing.guarded
def _aborted(processor: Any, states: dict[str, Any] | None, request_ids: list[str]) -> None:
    for request_id in request_ids:
        state = (states or {}).get(request_id)
        arrival = _arrival_of(state)
        if arrival is not None:
            _end_without_span(processor, arrival, state, _ABORT)


def around_process_outputs(process_outputs: Callable[..., Any]) -> Callable[..., Any]:
    """`OutputProcessor.process_outputs`: a request that the engine rejects when it arrives is dropped in there."""

    def call(self: Any, engine_core_outputs: Any, *args: Any, **kwargs: Any) -> Any:
        rejected = _states_of_rejected(self, engine_core_outputs)
        result = process_outputs(self, engine_core_outputs, *args, **kwargs)
        if rejected:
            _rejected(self, rejected)
        return result

    return call


@tracing.guarded
def _states_of_rejected(processor: Any, outputs: Any) -> list[tuple[Any, str]]:
    failed = [output for output in outputs if getattr(output, "error", None) is not None]
    return [(processor.request_states.get(output.request_id), output.error.code) for output in failed]


@tracing.guarded
def _rejected(processor: Any, rejected: list[tuple[Any, str]]) -> None:
    for state, code in rejected:
        arrival = _arrival_of(state)
        # One that is still there, or has ended in the usual way, vLLM goes on with.
        if arrival is not None and processor.request_states.get(state.request_id) is not state:
            _end_without_span(processor, arrival, state, _ERROR, code)


def _end_without_span(processor: Any, arrival: Arrival, state: Any, reason: str, error: str | None = None) -> None:
    """A request has ended of which vLLM makes no span."""
    if arrival.ended:  # of sequences of one call vLLM tells twice
        return
    arrival.ended = True
    ended_unix_ns = time.time_ns()
    if _vllm_traces(processor) and _gives_ids(processor):
        _make_llm_request(_maker(processor), arrival, state, ended_unix_ns, reason, error)
    _tell_end(processor, arrival, state, reason, ended_unix_ns)


def _make_llm_request(
    maker: Any, arrival: Arrival, state: Any, ended_unix_ns: int, reason: str, error: str | None
) -> None:
    if arrival.announced is not None:
        with chosen.ids(maker, arrival):
            tracer = maker if hasattr(maker, "start_span") else trace.get_tracer(chosen.TRACER)
            span = tracer.start_span(
                _LLM_REQUEST,
                context=arrival.context,
                kind=trace.SpanKind.SERVER,
                start_time=arrival.arrived_unix_ns,
            )
        # Not at the start: there a span gets those that the sampler saw, and that was at the request's arrival.
        span.set_attributes(
            {
                semconv.REQUEST_ID: arrival.announced.request_id,
                semconv.RESPONSE_ID: arrival.announced.response_id,
                semconv.FINISH_REASONS: [reason],
                semconv.PROMPT_TOKENS: state.prompt_len,
                semconv.COMPLETION_TOKENS: _output_tokens(state),
                semconv.LATENCY: semconv.seconds(ended_unix_ns - arrival.arrived_unix_ns),
            }
        )
        if error is not None:
            span.set_attribute(semconv.ERROR_TYPE, error)
            span.set_status(trace.StatusCode.ERROR, error)
        span.end(ended_unix_ns)


@tracing.guarded
def _end(processor: Any, state: Any, reason: str, ended_unix_ns: int) -> None:
    arrival = _arrival_of(state)
    if arrival is not None and not arrival.ended:
        arrival.ended = True
        _tell_end(processor, arrival, state, reason, ended_unix_ns)


def _tell_end(processor: Any, arrival: Arrival, state: Any, reason: str, ended_unix_ns: int) -> None:
    recorder = _recorder(processor)
    if arrival.announced is None or recorder is None:
        return
    key, tokens, dropped = arrival.announced.key, _output_tokens(state), recorder.drops.take_unsent()
    recorder.defer(dropped, frames.RequestEnd, key, ended_unix_ns, tokens, reason, dropped)


def _output_tokens(state: Any) -> int:
    stats, detokenizer = state.stats, state.detokenizer
    if stats is not None:
        return int(stats.num_generation_tokens)
    return 0 if detokenizer is None else int(detokenizer.num_output_tokens())


def _arrival_of(state: Any) -> Arrival | None:
    return getattr(state, _ATTRIBUTE, None)


def _recorder(processor: Any) -> Recorder | None:
    # The flag's endpoint is what vLLM's tracer has put into the environment; without the flag nothing has.
    return tracing.recorder(lambda: tracing.environment_endpoint() if _vllm_traces(processor) else None)
