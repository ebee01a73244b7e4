"""A mix of requests as servers get them, and what holds of all that arrives of them."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, Final

from otel_npu import semconv
from tests.helpers.tiny_model import words
from tests.helpers.vllm_spans import (
    LLM_REQUEST,
    Spans,
    assert_consistent,
    assert_phases,
    assert_shares_add_up,
    assert_steps_whole,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.helpers.vllm_client import Caller, Client

MIX: Final = 10
MIX_SEQUENCES: Final = 12
"""So many requests of the engine's are so many of the mix: two are two each."""


def mixed_request(client: Client, number: int, caller: Caller) -> None:
    """One request of a mix; those of 2 and 3 in ten are two for the engine."""
    headers, tokens = caller.headers(), 1 + number % 5
    short, long = words(3 + number % 20, number), words(100 + number % 50, number)
    ways: list[Callable[[], Any]] = [
        lambda: client.complete(short, headers, max_tokens=tokens),
        lambda: client.complete(long, headers, max_tokens=tokens),
        lambda: client.complete([short, long], headers, max_tokens=tokens),
        lambda: client.complete(short, headers, max_tokens=tokens, n=2, temperature=1),
        lambda: client.stream(short, headers, max_tokens=tokens),
        lambda: client.stream(long, headers, max_tokens=300, hang_up_after=2),
        lambda: client.chat(short, headers, max_tokens=tokens),
        lambda: client.complete(short, headers, max_tokens=12, stop=["1", "2", "3"]),
        lambda: client.complete(short, {**headers, "X-Request-Id": "the same"}, max_tokens=tokens),
        lambda: client.complete(short, headers, max_tokens=1),
    ]
    ways[number % MIX]()


def assert_mix(spans: Spans, callers: list[Caller]) -> None:
    """What a server has sent since it started, which is all that will arrive, is whole; these callers' mix is in it."""
    assert_consistent(spans, {span.parent_span_id for span in spans.named(LLM_REQUEST)})
    assert_steps_whole(spans)
    by_trace = Counter(span.trace_id for span in spans.named(LLM_REQUEST))
    for number, caller in enumerate(callers):
        assert by_trace[caller.trace_id] == 1 + (number % MIX in {2, 3}), f"request {number}"
    for request in spans.named(LLM_REQUEST):
        phases = spans.names(request)
        assert semconv.QUEUE in phases
        assert semconv.PREFILL in phases or request.attributes.get(semconv.FINISH_REASONS) == ["abort"]
        assert_phases(spans, request, phases)
    # Not to the last step: where the engine goes on with a request long after its client, the relay waits no longer.
    assert_shares_add_up(spans, rel=0.02)
