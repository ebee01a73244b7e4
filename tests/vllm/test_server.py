"""vLLM's real server, traced: what a user finds under `llm_request` when only `OTEL_NPU_ENABLED` is set."""

from __future__ import annotations

import functools
import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from otel_npu import semconv
from tests.helpers.prometheus import Prometheus
from tests.helpers.queries import blocks, found
from tests.helpers.receiver import Receiver
from tests.helpers.tiny_model import words
from tests.helpers.traced import eventually
from tests.helpers.vllm_client import Caller, Client, at_once
from tests.helpers.vllm_mix import MIX, MIX_SEQUENCES, assert_mix, mixed_request
from tests.helpers.vllm_server import SMALL, Server, free_port, needs_vllm
from tests.helpers.vllm_spans import (
    OURS,
    Spans,
    assert_phases,
    attributed_seconds,
    linked_steps,
    request_in,
    requests_of,
    steps_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from tests.helpers.receiver import Span

pytestmark = [pytest.mark.slow, needs_vllm]

MIXED_REQUESTS = 1000
CONCURRENCY = 32


@dataclass
class Serving:
    """The server of this module, its client, the receiver of its spans, and the port of its metrics."""

    server: Server
    client: Client
    receiver: Receiver
    metrics_port: int


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """One server for all tests here. Its steps are small and so is its cache: prompts come in chunks."""
    with Receiver() as receiver:
        endpoint = f"http://127.0.0.1:{receiver.grpc_port}"
        metrics_port = free_port()
        environment = {
            "OTEL_NPU_STEPS_PER_SECOND": "all",
            "OTEL_METRICS_EXPORTER": "prometheus",
            "OTEL_EXPORTER_PROMETHEUS_HOST": "127.0.0.1",
            "OTEL_EXPORTER_PROMETHEUS_PORT": str(metrics_port),
        }
        folder = tmp_path_factory.mktemp("vllm")
        with Server(folder, [*SMALL, "--otlp-traces-endpoint", endpoint], environment) as server:
            yield Serving(server, Client(server.port), receiver, metrics_port)


def test_a_request_with_a_traceparent_is_one_trace_with_its_phases_and_their_stages(serving: Serving) -> None:
    caller = Caller()
    serving.client.complete(words(5), caller.headers(), max_tokens=6)
    spans, request = request_in(serving.receiver, caller.trace_id)
    assert request.parent_span_id == caller.span_id
    assert_phases(spans, request)
    for phase in (semconv.PREFILL, semconv.DECODE):
        assert any(span.name == "forward" for span in spans.descendants(spans.child(request, phase)))


def test_our_spans_arrive_in_the_same_service_as_vllms(serving: Serving) -> None:
    caller = Caller()
    serving.client.complete(words(5), caller.headers())
    spans, request = request_in(serving.receiver, caller.trace_id)
    assert request.scope != OURS
    for span in spans.descendants(request):
        assert span.scope == OURS
        assert span.resource["service.name"] == request.resource["service.name"]


def test_a_step_links_to_its_requests_and_holds_its_ranks_step_with_its_stages(serving: Serving) -> None:
    caller = Caller()
    serving.client.complete(words(5), caller.headers(), max_tokens=3)
    spans, request = request_in(serving.receiver, caller.trace_id)
    eventually(lambda: len(linked_steps(Spans(serving.receiver.spans), request)) == 3, "three steps linked")
    spans = Spans(serving.receiver.spans)
    steps = linked_steps(spans, request)
    assert [step.attributes[semconv.STEP_KIND] for step in steps] == ["prefill", "decode", "decode"]
    for step in steps:
        worker_step = spans.child(step, semconv.WORKER_STEP)
        stages = spans.names(worker_step)
        assert stages[:3] == ["prepare_input", "forward", "post_process"]
        assert "sample" in stages
        assert step.start_ns <= worker_step.start_ns <= worker_step.end_ns <= step.end_ns


def test_a_request_without_a_traceparent_is_a_trace_of_its_own(serving: Serving) -> None:
    answer = serving.client.complete(words(5))
    spans, [request] = requests_of(serving.receiver, of_answer(answer))
    assert not request.parent_span_id
    assert_phases(spans, request)


@pytest.mark.parametrize("ask", ["complete", "chat"])
def test_the_spans_of_a_request_carry_its_id_and_the_one_that_its_client_got(serving: Serving, ask: str) -> None:
    answer = getattr(serving.client, ask)(words(5))
    spans, [request] = requests_of(serving.receiver, of_answer(answer))
    assert request.attributes[semconv.RESPONSE_ID] == answer["id"]
    for phase in spans.children(request):
        assert phase.attributes[semconv.REQUEST_ID] == request.attributes[semconv.REQUEST_ID]
        assert phase.attributes[semconv.RESPONSE_ID] == answer["id"]


def test_a_caller_that_does_not_sample_gets_nothing(serving: Serving) -> None:
    unsampled, sampled = Caller(), Caller()
    serving.client.complete(words(5), unsampled.headers("00"))
    serving.client.complete(words(5), sampled.headers())
    spans, _ = request_in(serving.receiver, sampled.trace_id)
    assert unsampled.trace_id not in {span.trace_id for span in spans.all}
    assert unsampled.trace_id not in {link[0] for span in spans.all for link in span.links}


def test_each_of_n_samples_has_spans_of_its_own(serving: Serving) -> None:
    caller = Caller()
    serving.client.complete(words(5), caller.headers(), n=3, temperature=1)
    spans, requests = requests_of(serving.receiver, lambda span: span.trace_id == caller.trace_id, 3)
    for request in requests:
        assert request.parent_span_id == caller.span_id
        assert_phases(spans, request)


def test_each_of_several_prompts_has_spans_of_its_own(serving: Serving) -> None:
    caller = Caller()
    serving.client.complete([words(5), words(90, 17), words(7, 200)], caller.headers())
    spans, requests = requests_of(serving.receiver, lambda span: span.trace_id == caller.trace_id, 3)
    for request in requests:
        assert_phases(spans, request)


def test_requests_whose_client_chose_the_same_id_are_told_apart(serving: Serving) -> None:
    callers = [Caller() for _ in range(4)]
    asking = [
        functools.partial(serving.client.complete, words(5), {"X-Request-Id": "again", **caller.headers()})
        for caller in callers
    ]
    at_once(asking, len(callers))
    for caller in callers:
        spans, request = request_in(serving.receiver, caller.trace_id)
        assert "again" in request.attributes[semconv.REQUEST_ID]
        assert_phases(spans, request)


def test_a_streamed_completion_and_a_chat_are_traced_alike(serving: Serving) -> None:
    streaming, chatting = Caller(), Caller()
    assert serving.client.stream(words(5), streaming.headers(), max_tokens=5)
    serving.client.chat(words(5), chatting.headers(), max_tokens=5)
    for caller in (streaming, chatting):
        spans, request = request_in(serving.receiver, caller.trace_id)
        assert_phases(spans, request)


def test_a_request_of_one_token_has_no_decode(serving: Serving) -> None:
    caller = Caller()
    serving.client.complete(words(5), caller.headers(), max_tokens=1)
    spans, request = request_in(serving.receiver, caller.trace_id)
    assert_phases(spans, request, (semconv.QUEUE, semconv.PREFILL))


def test_steps_that_ran_on_after_a_stop_string_are_surplus_and_in_no_phase(serving: Serving) -> None:
    prompt = words(5, 40)
    text = serving.client.complete(prompt, max_tokens=40)["choices"][0]["text"].split()
    stop = next(word for place, word in enumerate(text) if place >= 5 and word not in text[:place])
    surplus = []
    for _ in range(5):  # whether the engine has begun another step by then is a race; all are to be right
        caller = Caller()
        serving.client.complete(prompt, caller.headers(), max_tokens=40, stop=[stop])
        spans, request = request_in(serving.receiver, caller.trace_id)
        assert_phases(spans, request)
        surplus.append(sum(span.attributes.get(semconv.REQUEST_SURPLUS_STEPS, 0) for span in spans.children(request)))
    assert any(surplus)


def test_a_client_that_hangs_up_leaves_a_request_that_was_aborted_with_what_it_used(serving: Serving) -> None:
    for _ in range(20):  # a quick server may be done with all its tokens before it hears of it
        caller = Caller()
        chunks = serving.client.stream(words(30), caller.headers(), max_tokens=450, hang_up_after=5)
        spans, request = request_in(serving.receiver, caller.trace_id)
        assert chunks == 5
        if request.attributes[semconv.COMPLETION_TOKENS] < 450:
            break
    assert request.parent_span_id == caller.span_id
    assert request.attributes[semconv.FINISH_REASONS] == ["abort"]
    assert_phases(spans, request)
    assert attributed_seconds(spans, request) > 0


def test_a_prompt_in_chunks_is_one_prefill_of_several_steps(serving: Serving) -> None:
    caller = Caller()
    serving.client.complete(words(200, 300), caller.headers())  # in steps of at most 64 tokens
    spans, request = request_in(serving.receiver, caller.trace_id)
    assert_phases(spans, request)
    assert spans.child(request, semconv.PREFILL).attributes[semconv.REQUEST_STEPS] >= 4


def test_a_request_that_was_put_back_into_the_queue_says_so_and_is_whole(serving: Serving) -> None:
    caller = Caller()
    prompts = [words(60, 40 * number) for number in range(10)]
    before = serving.client.counted("num_preemptions")
    serving.client.complete(prompts, caller.headers(), max_tokens=200)
    preemptions = serving.client.counted("num_preemptions") - before
    assert preemptions > 0
    spans, requests = requests_of(serving.receiver, lambda span: span.trace_id == caller.trace_id, len(prompts))
    events: Counter[str] = Counter()
    for request in requests:
        assert_phases(spans, request)
        events.update(name for span in spans.children(request) for name, _ in span.events)
    assert events == {semconv.PREEMPTED: preemptions}


def test_prometheus_counts_the_steps_and_tokens_that_vllm_counts_and_its_exemplars_lead_to_spans(
    serving: Serving, tmp_path: Path
) -> None:
    client = serving.client
    with Prometheus(tmp_path, serving.metrics_port) as prometheus:

        def ours() -> tuple[float, float, float, float]:
            return (
                prometheus.value("sum(npu_step_tokens_count)"),
                prometheus.value('sum(npu_stage_duration_seconds_count{npu_stage_name="forward"})'),
                prometheus.value("sum(npu_step_tokens_sum)"),
                prometheus.value("sum(npu_request_device_time_seconds_count)"),
            )

        def theirs() -> tuple[float, float, float, float]:
            steps = client.counted("iteration_tokens", "total_count")
            requests = client.counted("request_success")
            # The last token of a request is never computed with.
            tokens = client.counted("prompt_tokens") + client.counted("generation_tokens") - requests
            return steps, steps, tokens, requests

        def grown(before: Sequence[float], now: Sequence[float]) -> list[float]:
            return [after - earlier for earlier, after in zip(before, now, strict=True)]

        prometheus.eventually(lambda: prometheus.query("npu_step_tokens_count"), "the relay is scraped")
        ours_before, theirs_before = ours(), theirs()
        prompts = [words(10, 37 * number) for number in range(8)]  # no block is full, so none is in the cache
        at_once([functools.partial(client.complete, prompt, max_tokens=6) for prompt in prompts], 4)
        assert eventually(lambda: grown(theirs_before, theirs())[3] == 8, "vLLM counts all requests")
        prometheus.eventually(
            lambda: grown(ours_before, ours()) == grown(theirs_before, theirs()),
            f"{grown(ours_before, ours())} are counted as {grown(theirs_before, theirs())} by vLLM",
        )
        assert grown(theirs_before, theirs())[2] == 8 * (10 + 6 - 1)

        exemplars = prometheus.eventually(lambda: prometheus.exemplars('{__name__=~"npu_.*_bucket"}'), "exemplars")
        ids = {(exemplar["labels"]["trace_id"], exemplar["labels"]["span_id"]) for exemplar in exemplars}
        spans = serving.receiver.spans
        assert len(ids) > 1
        assert ids <= {(span.trace_id, span.span_id) for span in spans}


def test_of_a_thousand_mixed_requests_nothing_is_missing_twice_or_out_of_place(serving: Serving) -> None:
    """With every step kept: over all that the server has sent since it started."""
    callers = [Caller() for _ in range(MIXED_REQUESTS)]
    at_once(
        [functools.partial(mixed_request, serving.client, *numbered) for numbered in enumerate(callers)], CONCURRENCY
    )
    traces = {caller.trace_id for caller in callers}
    requests_of(serving.receiver, lambda span: span.trace_id in traces, len(traces) * MIX_SEQUENCES // MIX)
    steps_of(serving.receiver)  # of which a server that is stopped may lose the last
    serving.server.stop()  # so that all that will ever arrive has arrived

    spans = Spans(serving.receiver.spans)
    assert_mix(spans, callers)
    assert [search for search in jaeger_searches() if not finds(search, serving.receiver)] == []
    assert [query for query in blocks("traceql") if not _NOT_HERE.search(query) and not found(query, spans)] == []


def of_answer(answer: dict[str, Any]) -> Callable[[Span], bool]:
    """Whether a span is of the request that was answered so."""
    return lambda span: str(span.attributes.get(semconv.REQUEST_ID, "")).startswith(answer["id"])


def jaeger_searches() -> list[str]:
    """Those of the page of queries, but for the one for what hangs, which nothing does here."""
    return sorted({search for search in blocks("jaeger") if semconv.UNFINISHED_STAGE not in search})


_NOT_HERE = re.compile(
    r'timing = "device"|npu\.device\.duration|npu\.enqueue|worker_step rank|"slow"|unfinished_stage|npu\.dropped'
)
"""In a query: no device times here, there is one rank, nothing is kept for slowness alone, hangs, or is lost."""


def finds(search: str, receiver: Receiver) -> bool:
    """Whether it finds what it says, but for its values: in all that the server has sent."""
    fields = dict(line.split(": ", 1) for line in search.splitlines())
    tags = {tag.partition("=")[0] for tag in fields.get("Tags", "").split()}
    return any(tags <= span.attributes.keys() for span in receiver.named(fields["Operation"]))
