"""vLLM's provider of tracers, or its tracer: its span of a request gets what was chosen at arrival."""

from __future__ import annotations

import contextlib
import contextvars
import copy
import functools
from typing import TYPE_CHECKING, Any, Final

from otel_npu import semconv
from otel_npu.vllm import tracing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from otel_npu.vllm.arrival import Arrival

TRACER: Final = "vllm.tracing.otel"
"""Makes vLLM's span of a request."""

_arrival: contextvars.ContextVar[Arrival | None] = contextvars.ContextVar("otel_npu_chosen", default=None)


@contextlib.contextmanager
def ids(maker: Any, arrival: Arrival) -> Iterator[None]:
    """The span that is started inside has the ids and the verdict of its request's arrival."""
    _prepare(maker)
    token = _arrival.set(arrival)
    try:
        yield
    finally:
        _arrival.reset(token)


@tracing.guarded
def _prepare(maker: Any) -> None:
    if not hasattr(maker, "id_generator") or hasattr(maker, "_otel_npu_prepared"):
        return
    generator, sampler = maker.id_generator, maker.sampler
    # Wrapped on the objects: whatever else they can do, and whatever class they are of, stays as it is.
    maker.id_generator = _Instead(generator, generate_trace_id=_trace_id, generate_span_id=_span_id)
    maker.sampler = _Instead(sampler, should_sample=_sampling)
    maker._otel_npu_prepared = True
    if hasattr(maker, "get_tracer"):
        # A provider may keep its tracers, and the one that is meant have been made by a request that came while capture
        # was off.
        tracer = maker.get_tracer(TRACER)
        if hasattr(tracer, "id_generator"):
            tracer.id_generator, tracer.sampler = maker.id_generator, maker.sampler


class _Instead:
    """An object with some of its methods replaced; each gets the one that it replaces."""

    def __init__(self, inner: Any, **methods: Callable[..., Any]) -> None:
        self._inner = inner
        for name, method in methods.items():
            setattr(self, name, functools.partial(method, getattr(inner, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def _trace_id(generate: Callable[[], int]) -> int:
    arrival = _arrival.get()
    if arrival is None or arrival.announced is None:
        return generate()
    return int.from_bytes(arrival.announced.trace_id, "big")


def _span_id(generate: Callable[[], int]) -> int:
    arrival = _arrival.get()
    if arrival is None or arrival.announced is None:
        return generate()
    return int.from_bytes(arrival.announced.key, "big")


def _sampling(should_sample: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    arrival = _arrival.get()
    if arrival is None or arrival.sampling is None:
        return should_sample(*args, **kwargs)
    if arrival.announced is None:
        return arrival.sampling
    # What a sampler gives with its verdict, the span has from its start.
    told = copy.copy(arrival.sampling)
    told.attributes = {**(told.attributes or {}), semconv.RESPONSE_ID: arrival.announced.response_id}
    return told
