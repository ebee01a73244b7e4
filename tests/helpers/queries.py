"""The searches of `deploy/queries.md`, and what they find once somebody has put values of their own into them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from otel_npu import semconv
from tests.helpers import REPOSITORY, traceql

if TYPE_CHECKING:
    from tests.helpers.receiver import Span
    from tests.helpers.vllm_spans import Spans

TEXT: Final = (REPOSITORY / "deploy/queries.md").read_text()


def blocks(language: str) -> list[str]:
    """All that are in this language."""
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def found(query: str, spans: Spans) -> list[Span]:
    """What a query in TraceQL finds, with no more than its values replaced: ids by some that are there, limits by 0."""
    numbers = {span.attributes[semconv.STEP_NUMBER] for span in spans.named(semconv.ENGINE_STEP)}
    shown = (span for span in spans.named(semconv.DECODE_STEP) if span.attributes[semconv.STEP_NUMBER] in numbers)
    step = next(shown)
    decode = spans.parent(step)
    assert decode is not None
    linked = next(trace_id for span in spans.named(semconv.ENGINE_STEP) for trace_id, _ in span.links)
    values = {
        "cmpl-4f1c": decode.attributes[semconv.RESPONSE_ID],
        "3f2a": step.resource[semconv.SERVICE_INSTANCE_ID],
        "4711": str(step.attributes[semconv.STEP_NUMBER]),
        "4bf92f3577b34da6a3ce929d0e0e4736": linked,
    }
    query = re.sub("|".join(values), lambda example: values[example[0]], query)
    query = re.sub(r"> \d+(ms|s)\b", "> 0s", query)
    query = re.sub(r"> \d*\.\d+", "> 0.0", query)
    return traceql.parse(query).find(spans)
