"""The front end that the demo traces: it makes `llm_request`, as vLLM's does, and exports it itself."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, TraceFlags

from otel_npu import semconv
from otel_npu.semconv import seconds

if TYPE_CHECKING:
    from collections.abc import Sequence

    from opentelemetry.sdk.trace.export import SpanExporter

    from otel_npu.cli.demo.workload import Request

LLM_REQUEST: Final = "llm_request"
_SCOPE: Final = InstrumentationScope("otel_npu.demo")
_DELAY_MS: Final = 500
_FIRST_TOKEN: Final = "gen_ai.latency.time_to_first_token"  # noqa: S105  vLLM's own name of it


class FrontEnd:
    """Makes a span of each request that is over.

    Args:
        exporters: Where it goes.
    """

    def __init__(self, exporters: Sequence[SpanExporter]) -> None:
        self._resource = Resource.create()
        self._processors = [BatchSpanProcessor(exporter, schedule_delay_millis=_DELAY_MS) for exporter in exporters]
        self.count = 0

    def ended(self, request: Request, reason: str) -> None:
        """A request is over, for this reason."""
        now_ns = time.time_ns()
        attributes: dict[str, Any] = {
            semconv.REQUEST_ID: request.request_id,
            semconv.RESPONSE_ID: request.response_id,
            semconv.FINISH_REASONS: [reason],
            semconv.PROMPT_TOKENS: request.prompt_tokens,
            semconv.COMPLETION_TOKENS: request.generated,
            semconv.LATENCY: seconds(now_ns - request.arrived_unix_ns),
            _FIRST_TOKEN: seconds(request.first_token_unix_ns - request.arrived_unix_ns),
        }
        trace_id, span_id = int.from_bytes(request.trace_id, "big"), int.from_bytes(request.key, "big")
        span = ReadableSpan(
            LLM_REQUEST,
            SpanContext(trace_id, span_id, is_remote=False, trace_flags=TraceFlags(TraceFlags.SAMPLED)),
            resource=self._resource,
            attributes=attributes,
            kind=SpanKind.SERVER,
            instrumentation_scope=_SCOPE,
            start_time=request.arrived_unix_ns,
            end_time=now_ns,
        )
        self.count += 1
        for processor in self._processors:
            processor.on_end(span)

    def flush(self, timeout_seconds: float) -> None:
        """Export what has ended so far, and wait for it."""
        for processor in self._processors:
            processor.force_flush(round(timeout_seconds * 1000))

    def close(self) -> None:
        """Export the rest."""
        for processor in self._processors:
            processor.shutdown()  # type: ignore[no-untyped-call]
