"""What the front end chooses for a request, on an output processor of the same shape as vLLM's and the real SDK."""

from __future__ import annotations

import asyncio
import copy
import gc
import types
from typing import TYPE_CHECKING, Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, Decision, ParentBased, Sampler, SamplingResult
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from otel_npu import semconv
from otel_npu.capture import switch
from otel_npu.vllm import front_end
from otel_npu.vllm.arrival import KEY, Announced, Arrival, announced
from otel_npu.wire import frames
from tests.helpers.capturing import capturing

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.helpers.capturing import Captured

CALLER = f"00-{0xABC:032x}-{0xDEF:016x}-01"
PARENT_BASED = ParentBased(ALWAYS_ON)
UNSAMPLED = f"00-{0xABC:032x}-{0xDEF:016x}-00"


class Processor:
    """Keeps states, makes `llm_request` when a request finishes, and none when it is aborted."""

    def __init__(self, *, tracing_enabled: bool = True) -> None:
        self.tracing_enabled = tracing_enabled
        self.request_states: dict[str, Any] = {}
        self.children: dict[str, list[str]] = {}

    def add_request(self, request: Any) -> None:
        self.request_states[request.request_id] = types.SimpleNamespace(
            request_id=request.request_id,
            trace_headers=request.trace_headers,
            prompt_len=4,
            stats=types.SimpleNamespace(num_generation_tokens=3),
            detokenizer=None,
        )

    def finish(self, request_id: str) -> None:
        state = self.request_states.pop(request_id)
        self._update_stats_from_finished(state, "stop")
        if self.tracing_enabled:
            self.do_tracing(types.SimpleNamespace(trace_headers=state.trace_headers), state)

    def _update_stats_from_finished(self, req_state: Any, finish_reason: Any) -> None: ...

    def do_tracing(self, engine_core_output: Any, req_state: Any) -> None:
        headers = engine_core_output.trace_headers
        context = TraceContextTextMapPropagator().extract(headers) if headers else None
        trace.get_tracer("vllm.tracing.otel").start_span("llm_request", context, trace.SpanKind.SERVER).end()

    def abort_requests(self, request_ids: list[str], internal: bool = False) -> list[str]:
        aborted = []
        for request_id in request_ids:
            if self.request_states.pop(request_id, None) is not None:
                aborted.append(request_id)
            else:
                aborted += self.abort_requests(self.children.pop(request_id, []), True)
        return aborted

    def process_outputs(self, engine_core_outputs: list[Any]) -> str:
        for output in engine_core_outputs:
            if output.error is None:
                self.finish(output.request_id)
            else:
                self.request_states.pop(output.request_id, None)  # as from vLLM 0.33
        return "processed"

    add_request = front_end.around_add_request(add_request)
    process_outputs = front_end.around_process_outputs(process_outputs)
    _update_stats_from_finished = front_end.around_finished(_update_stats_from_finished)
    do_tracing = front_end.around_tracing(do_tracing)
    abort_requests = front_end.around_abort(abort_requests)


class OldProcessor(Processor):
    """As in vLLM 0.11 and 0.13: it holds one tracer, made at start-up, which copies what it needs of the provider."""

    def __init__(self, provider: Provider) -> None:
        super().__init__()
        del self.tracing_enabled
        self.tracer = provider.provider.get_tracer("vllm.llm_engine")

    def finish(self, request_id: str) -> None:
        state = self.request_states.pop(request_id)
        self._update_stats_from_finished(state, "stop")
        self.do_tracing(types.SimpleNamespace(trace_headers=state.trace_headers), state)

    def do_tracing(self, engine_core_output: Any, req_state: Any) -> None:
        context = TraceContextTextMapPropagator().extract(engine_core_output.trace_headers or {})
        with self.tracer.start_as_current_span("llm_request", context, trace.SpanKind.SERVER):
            pass

    do_tracing = front_end.around_tracing(do_tracing)


class Counting(Sampler):
    """Samples every other request that it is asked about."""

    def __init__(self) -> None:
        self.asked = 0

    def should_sample(self, *_args: Any, **_kwargs: Any) -> SamplingResult:
        self.asked += 1
        return SamplingResult(Decision.RECORD_AND_SAMPLE if self.asked % 2 else Decision.DROP)

    def get_description(self) -> str:
        return "every other"


class Provider:
    """A real provider, in the place of the program's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, sampler: Sampler = PARENT_BASED) -> None:
        self._exporter = InMemorySpanExporter()
        self.provider = TracerProvider(sampler=sampler)
        self.provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        monkeypatch.setattr(trace, "get_tracer_provider", lambda: self.provider)

    def spans(self) -> list[ReadableSpan]:
        return list(self._exporter.get_finished_spans())

    def forget(self) -> None:
        self._exporter.clear()

    def ids(self) -> list[tuple[int, int, int | None]]:
        """Trace id, span id and the parent's span id of each span."""
        return [
            (span.context.trace_id, span.context.span_id, span.parent.span_id if span.parent else None)
            for span in self.spans()
        ]


@pytest.fixture
def provider(monkeypatch: pytest.MonkeyPatch) -> Iterator[Provider]:
    provider = Provider(monkeypatch)
    yield provider
    provider.provider.shutdown()


def request(request_id: str = "id-0", headers: dict[str, str] | None = None) -> Any:
    return types.SimpleNamespace(
        request_id=request_id, external_req_id="id", trace_headers=headers, arrival_time=1_700_000_000.25
    )


def numbers(told: Announced) -> tuple[int, int, int]:
    return tuple(int.from_bytes(value, "big") for value in (told.trace_id, told.key, told.parent_span_id))  # type: ignore[return-value]


def ends(captured: Captured) -> list[frames.RequestEnd]:
    captured.finish()
    return [frame for frame in captured.sent if isinstance(frame, frames.RequestEnd)]


def arrive(processor: Processor, made: Any) -> Announced:
    processor.add_request(made)
    told = announced(made.trace_headers)
    assert told is not None
    return told


def test_what_the_front_end_left_out_goes_with_a_requests_end(captured: Captured) -> None:
    recorder = switch.current_recorder()
    assert recorder is not None
    recorder.drops.add(semconv.INTERNAL_ERROR, 3)
    processor = Processor()
    for _ in range(2):
        arrive(processor, request(headers={"traceparent": CALLER}))
        processor.finish("id-0")
    first, second = ends(captured)
    assert (first.dropped, second.dropped) == ({semconv.INTERNAL_ERROR: 3}, {})


def test_llm_request_gets_the_ids_that_were_told_to_the_engine(captured: Captured, provider: Provider) -> None:
    processor = Processor()
    told = arrive(processor, request(headers={"traceparent": CALLER}))
    processor.finish("id-0")
    trace_id, key, parent = numbers(told)
    assert (trace_id, key) == (0xABC, parent)
    assert provider.ids() == [(0xABC, key, 0xDEF)]
    (end,) = ends(captured)
    assert (end.key, end.output_tokens, end.reason) == (told.key, 3, "stop")


def test_so_it_does_after_requests_that_came_while_capture_was_off(captured: Captured, provider: Provider) -> None:
    """A provider may keep the tracer that vLLM has had from it, which has what the provider had then."""
    processor = Processor()
    recorder = captured.recorder
    recorder.obey(on=False)
    processor.add_request(request(headers={"traceparent": CALLER}))
    processor.finish("id-0")
    recorder.obey(on=True)
    provider.forget()
    told = arrive(processor, request("id-1", headers={"traceparent": CALLER}))
    processor.finish("id-1")
    _, key, _ = numbers(told)
    assert provider.ids() == [(0xABC, key, 0xDEF)]


def test_headers_may_be_bytes_as_asgi_gives_them(captured: Captured, provider: Provider) -> None:
    processor = Processor()
    headers: Any = {b"traceparent": CALLER.encode()}
    told = arrive(processor, request(headers=headers))
    processor.finish("id-0")
    assert numbers(told)[0] == 0xABC
    assert provider.ids()[0][2] == 0xDEF


@pytest.mark.parametrize("bad", [f"ff{CALLER[2:]}", f"{CALLER}-more"])
def test_what_is_no_traceparent_by_the_letter_is_no_parent(captured: Captured, provider: Provider, bad: str) -> None:
    processor = Processor()
    told = arrive(processor, request(headers={"traceparent": bad}))
    processor.finish("id-0")
    assert numbers(told)[0] != 0xABC
    assert provider.ids()[0][2] is None


def test_without_a_parent_llm_request_is_a_root(captured: Captured, provider: Provider) -> None:
    processor = Processor()
    trace_id, key, _ = numbers(arrive(processor, request()))
    processor.finish("id-0")
    assert provider.ids() == [(trace_id, key, None)]


def test_an_active_span_is_the_parent_although_it_is_gone_at_the_end(captured: Captured, provider: Provider) -> None:
    processor = Processor()
    with provider.provider.get_tracer("test").start_as_current_span("caller") as caller:
        arrive(processor, request())
    processor.finish("id-0")
    assert provider.ids()[1][2] == caller.get_span_context().span_id


@pytest.mark.parametrize("variable", ["TRACEPARENT", "traceparent"])
def test_a_traceparent_in_the_environment_is_the_parent(
    captured: Captured, provider: Provider, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, CALLER)
    processor = Processor()
    told = arrive(processor, request())
    processor.finish("id-0")
    assert provider.ids() == [(0xABC, numbers(told)[1], 0xDEF)]


def test_a_caller_that_does_not_sample_gets_nothing(captured: Captured, provider: Provider) -> None:
    processor = Processor()
    made = request(headers={"traceparent": UNSAMPLED})
    processor.add_request(made)
    processor.finish("id-0")
    assert announced(made.trace_headers) is None
    assert not provider.spans()
    assert not ends(captured)


def test_the_sampler_is_asked_once_at_arrival_and_held_to_it(
    captured: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = Counting()
    provider = Provider(monkeypatch, sampler)
    processor = Processor()
    made = [request(f"id-{number}") for number in range(4)]
    for each in made:
        processor.add_request(each)
    told = [announced(each.trace_headers) for each in made]
    for number in reversed(range(4)):  # in another order, in which the sampler would have said otherwise
        processor.finish(f"id-{number}")
    assert sampler.asked == 4
    assert [each is not None for each in told] == [True, False, True, False]
    kept = {numbers(each)[1] for each in told if each is not None}
    assert {span_id for _, span_id, _ in provider.ids()} == kept


def test_each_sequence_of_one_call_has_a_span_of_its_own_under_the_caller(
    captured: Captured, provider: Provider
) -> None:
    processor = Processor()
    first = request("0_id", {"traceparent": CALLER})
    second = copy.copy(first)
    second.request_id = "1_id"
    told = [arrive(processor, made) for made in (first, second)]
    assert len({each.key for each in told}) == 2
    assert {each.trace_id for each in told} == {(0xABC).to_bytes(16, "big")}


@pytest.mark.parametrize(
    ("given", "told"),
    [("a;b-c\nd", "a;b-c\nd"), ("ü", "ü"), ("\ud800", "?"), ("x" * 200_000, "x" * 1024)],
    ids=["text", "umlaut", "surrogate", "200 kB"],
)
def test_the_users_id_of_the_request_is_told_whatever_is_in_it(
    captured: Captured, provider: Provider, given: str, told: str
) -> None:
    made = request()
    made.external_req_id = given
    assert arrive(Processor(), made).request_id == told


@pytest.mark.parametrize("aborted", [False, True])
def test_vllm_of_one_tracer_gives_its_span_the_ids_too(
    captured: Captured, provider: Provider, *, aborted: bool
) -> None:
    processor = OldProcessor(provider)
    told = arrive(processor, request(headers={"traceparent": CALLER}))
    if aborted:
        processor.abort_requests(["id-0"])
    else:
        processor.finish("id-0")
    assert provider.ids() == [(0xABC, numbers(told)[1], 0xDEF)]
    assert [end.key for end in ends(captured)] == [told.key]


def test_vllm_of_one_tracer_is_held_to_the_verdict_of_the_arrival_too(
    captured: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = Counting()
    provider = Provider(monkeypatch, sampler)
    processor = OldProcessor(provider)
    for number in range(3):
        processor.add_request(request(f"id-{number}"))
    for number in range(3):
        processor.finish(f"id-{number}")
    assert sampler.asked == 3
    assert len(provider.spans()) == 2


def test_vllm_before_it_traced_requests_is_left_in_peace(captured: Captured) -> None:
    made = request()
    del made.trace_headers
    made.trace_headers_ = None
    with pytest.raises(AttributeError):  # its own, of this test's processor
        Processor(tracing_enabled=False).add_request(made)
    assert captured.recorder.drops.take_unsent() == {}


def test_a_session_with_its_inputs_in_a_stream_has_no_request_spans(captured: Captured, provider: Provider) -> None:
    processor = Processor()
    made = request()
    made.resumable = True
    processor.add_request(made)
    last = request()
    processor.add_request(last)  # the end of the session, which is not resumable itself
    assert announced(made.trace_headers) is announced(last.trace_headers) is None


@pytest.mark.parametrize(
    ("request_id", "response_id"),
    [
        ("cmpl-4f1c-0", "cmpl-4f1c"),
        ("cmpl-my-own-7-12", "cmpl-my-own-7"),
        ("chatcmpl-4f1c", "chatcmpl-4f1c"),
        ("chatcmpl-of-2024-1", "chatcmpl-of-2024-1"),  # the caller's own words
        ("id-0", "id-0"),
    ],
)
def test_the_id_that_the_client_got_is_the_one_without_the_prompts_number(request_id: str, response_id: str) -> None:
    told = Announced(b"k" * 8, b"t" * 16, b"s" * 8, request_id)
    assert told.response_id == response_id


def test_llm_request_has_the_id_that_the_client_got(captured: Captured, provider: Provider) -> None:
    processor = Processor()
    made = request("cmpl-4f1c-0")
    made.external_req_id = made.request_id
    arrive(processor, made)
    processor.finish("cmpl-4f1c-0")
    [span] = provider.spans()
    assert (span.attributes or {})["gen_ai.response.id"] == "cmpl-4f1c"


def test_other_spans_of_the_provider_keep_their_own_ids(captured: Captured, provider: Provider) -> None:
    processor = Processor()
    arrive(processor, request())
    processor.finish("id-0")
    for _ in range(2):
        provider.provider.get_tracer("test").start_span("another").end()
    assert len(set(provider.ids())) == 3


def test_an_aborted_request_has_an_llm_request_that_says_so(captured: Captured, provider: Provider) -> None:
    processor = Processor()
    told = arrive(processor, request(headers={"traceparent": CALLER}))
    assert processor.abort_requests(["id-0"]) == ["id-0"]
    (span,) = provider.spans()
    assert provider.ids() == [(0xABC, numbers(told)[1], 0xDEF)]
    assert (span.name, span.kind, span.start_time) == (
        "llm_request",
        trace.SpanKind.SERVER,
        int(1_700_000_000.25 * 1e9),
    )
    assert span.attributes is not None
    assert span.attributes["gen_ai.response.finish_reasons"] == ("abort",)
    assert span.attributes["gen_ai.request.id"] == "id"
    assert [(end.key, end.reason) for end in ends(captured)] == [(told.key, "abort")]


def test_sequences_that_are_aborted_together_have_one_llm_request_each(captured: Captured, provider: Provider) -> None:
    processor = Processor()
    for request_id in ("0_id", "1_id"):
        arrive(processor, request(request_id))
    processor.children["id"] = ["0_id", "1_id"]
    processor.abort_requests(["id"], internal=True)
    assert len(provider.spans()) == 2
    assert len(ends(captured)) == 2


def test_a_request_that_is_rejected_on_arrival_has_an_llm_request_with_an_error(
    captured: Captured, provider: Provider
) -> None:
    processor = Processor()
    told = arrive(processor, request(headers={"traceparent": CALLER}))
    arrive(processor, request("id-1", headers={"traceparent": CALLER}))
    error = types.SimpleNamespace(code="engine_paused", message="with words of somebody's")
    outputs = [
        types.SimpleNamespace(request_id="id-0", error=error),
        types.SimpleNamespace(request_id="id-1", error=None),
        types.SimpleNamespace(request_id="nobody", error=error),
    ]
    assert processor.process_outputs(outputs) == "processed"
    _, rejected = provider.spans()
    assert provider.ids()[1] == (*numbers(told)[:2], 0xDEF)
    assert rejected.attributes is not None
    assert rejected.attributes["gen_ai.response.finish_reasons"] == ("error",)
    assert rejected.attributes["error.type"] == "engine_paused"
    assert rejected.status.status_code is trace.StatusCode.ERROR
    assert "words" not in str(rejected.status.description)
    assert [(end.key, end.reason) for end in ends(captured)][1] == (told.key, "error")


def test_an_unsampled_request_that_is_aborted_has_none(captured: Captured, provider: Provider) -> None:
    processor = Processor()
    processor.add_request(request(headers={"traceparent": UNSAMPLED}))
    processor.abort_requests(["id-0"])
    assert not provider.spans()
    assert not ends(captured)


@pytest.mark.slow
def test_nothing_is_left_of_10000_requests(captured: Captured, provider: Provider) -> None:
    processor = Processor()
    for number in range(10_000):
        processor.add_request(request())
        if number % 2:
            processor.finish("id-0")
        else:
            processor.abort_requests(["id-0"])
        provider.forget()
    gc.collect()
    # By type(): isinstance() asks each object for its `__class__`, which may be anybody's code.
    assert not [made for made in gc.get_objects() if type(made) is Arrival]


# Where vLLM itself doesn't trace.


class AsyncLLM:
    """Drops the caller's trace headers, as vLLM does without an endpoint."""

    def __init__(self) -> None:
        self.output_processor = Processor(tracing_enabled=False)

    async def add_request(self, request_id: str, *, trace_headers: dict[str, str] | None = None) -> Any:
        trace_headers = None
        made = request(request_id, trace_headers)
        self.output_processor.add_request(made)
        return made

    add_request = front_end.around_generate(add_request)  # type: ignore[assignment]


def test_where_vllm_does_not_trace_request_spans_join_the_callers(captured: Captured) -> None:
    engine = AsyncLLM()
    made = asyncio.run(engine.add_request("id-0", trace_headers={"traceparent": CALLER}))
    told = announced(made.trace_headers)
    assert told is not None
    trace_id, key, parent = numbers(told)
    assert (trace_id, parent) == (0xABC, 0xDEF)
    assert key != parent
    engine.output_processor.finish("id-0")
    assert [end.key for end in ends(captured)] == [told.key]


@pytest.mark.parametrize("headers", [None, {"traceparent": UNSAMPLED}, {"traceparent": "nonsense"}])
def test_where_vllm_does_not_trace_and_nobody_calls_there_are_no_request_spans(
    captured: Captured, headers: dict[str, str] | None
) -> None:
    made = asyncio.run(AsyncLLM().add_request("id-0", trace_headers=headers))
    assert announced(made.trace_headers) is None


# Off, and faults.


def test_request_spans_can_be_turned_off(provider: Provider) -> None:
    with capturing(request_spans="off"):
        made = request(headers={"traceparent": CALLER})
        processor = Processor()
        processor.add_request(made)
        processor.finish("id-0")
    assert made.trace_headers == {"traceparent": CALLER}
    assert len(provider.spans()) == 1


def test_a_fault_of_ours_is_counted_and_vllm_goes_on(
    captured: Captured, provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_args: object, **_kwargs: object) -> None:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(front_end, "_choose", fail)
    processor = Processor()
    processor.add_request(request())
    processor.finish("id-0")
    assert len(provider.spans()) == 1
    assert captured.recorder.drops.take_unsent() == {"internal_error": 1}


@pytest.mark.parametrize("headers", [None, {}, {"traceparent": CALLER}, {KEY: ""}, {KEY: "zz-zz-zz;id"}])
def test_headers_that_announce_nothing_are_no_request(headers: dict[str, str] | None) -> None:
    assert announced(headers) is None
