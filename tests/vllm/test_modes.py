"""vLLM's real server in other ways than the usual: several ranks, asynchronous scheduling, an NPU, and killed."""

from __future__ import annotations

import functools
import itertools
from typing import TYPE_CHECKING

import pytest

from otel_npu import semconv
from otel_npu.wire import frames
from tests.helpers.queries import blocks, found
from tests.helpers.receiver import Receiver
from tests.helpers.tiny_model import token_id, words
from tests.helpers.traced import eventually
from tests.helpers.vllm_client import Caller, Client, at_once
from tests.helpers.vllm_plugins import FRAMES_FOLDER, KERNELS_NS, sent_frames
from tests.helpers.vllm_server import ROOMY, Server, needs_vllm
from tests.helpers.vllm_spans import (
    LLM_REQUEST,
    Spans,
    assert_consistent,
    assert_phases,
    assert_shares_add_up,
    assert_steps_whole,
    linked_steps,
    request_in,
    requests_of,
    steps_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.helpers.receiver import Span

pytestmark = [pytest.mark.slow, needs_vllm]

EVERY_STEP = {"OTEL_NPU_STEPS_PER_SECOND": "all"}


def traces_to(receiver: Receiver) -> list[str]:
    """The arguments that make vLLM trace."""
    return ["--otlp-traces-endpoint", f"http://127.0.0.1:{receiver.grpc_port}"]


def ask_mixed(client: Client, count: int) -> list[Caller]:
    """So many requests, at once, of different lengths; those with an odd number find a stop string if they can."""
    callers = [Caller() for _ in range(count)]
    asking = [
        functools.partial(
            client.complete,
            words(3 + number % 40, number),
            caller.headers(),
            max_tokens=1 + number % 7,
            stop=["1", "2", "3"] if number % 2 else None,
        )
        for number, caller in enumerate(callers)
    ]
    at_once(asking, 16)
    return callers


def assert_all_right(spans: Spans, callers: list[Caller], ranks: int = 1) -> None:
    """What has arrived of these requests, which is all that will, is whole and consistent."""
    requests = spans.named(LLM_REQUEST)
    assert {caller.trace_id for caller in callers} <= {span.trace_id for span in requests}
    assert len({span.trace_id for span in requests}) == len(requests)
    for request in requests:
        phases = spans.names(request)
        assert {semconv.QUEUE, semconv.PREFILL} <= set(phases)
        assert_phases(spans, request, phases)
        assert linked_steps(spans, request)
    assert_consistent(spans)
    assert_steps_whole(spans, ranks)
    assert_shares_add_up(spans)


def test_with_asynchronous_scheduling_all_is_in_place_though_steps_overlap(receiver: Receiver, tmp_path: Path) -> None:
    plugins = {"unforced": "tests.helpers.vllm_plugins:unforce_async_scheduling"}
    with Server(tmp_path, [*ROOMY, *traces_to(receiver)], EVERY_STEP, plugins) as server:
        client = Client(server.port)
        last = client.complete(words(5), max_tokens=3)["choices"][0]["text"].split()[-1]
        caller = Caller()
        client.complete(words(5), caller.headers(), max_tokens=8, stop_token_ids=[token_id(last)])
        spans, request = request_in(receiver, caller.trace_id)
        assert surplus_steps(spans, request) == 1  # its next step was under way when the engine saw that token
        callers = ask_mixed(client, 100)
        server.stop()
    spans = Spans(receiver.spans)
    assert_all_right(spans, callers)
    steps = sorted(spans.named(semconv.ENGINE_STEP), key=lambda step: step.start_ns)
    assert any(later.start_ns < earlier.end_ns for earlier, later in itertools.pairwise(steps))


def test_all_ranks_of_a_step_are_in_one_trace_and_what_was_sent_survives_sigkill(
    receiver: Receiver, tmp_path: Path
) -> None:
    """Two tests in one, for the server's sake, which takes half a minute to start."""
    sent = tmp_path / "sent"
    sent.mkdir()
    environment = {**EVERY_STEP, "VLLM_CPU_OMP_THREADS_BIND": "nobind", FRAMES_FOLDER: str(sent)}
    plugins = {"recorded": "tests.helpers.vllm_plugins:record_sent_frames"}
    arguments = [*ROOMY, *traces_to(receiver), "--tensor-parallel-size", "2"]
    with Server(tmp_path, arguments, environment, plugins) as server:
        client = Client(server.port)
        callers = ask_mixed(client, 100)
        traces = {caller.trace_id for caller in callers}
        requests_of(receiver, lambda span: span.trace_id in traces, len(callers))
        spans = steps_of(receiver, ranks=2, all_kept=True)
        assert_all_right(spans, callers, ranks=2)
        of_ranks = [query for query in blocks("traceql") if "worker_step rank" in query]
        assert of_ranks
        assert all(found(query, spans) for query in of_ranks)

        hanging_up = functools.partial(client.stream, words(5), max_tokens=450, hang_up_after=50)
        at_once([hanging_up] * 2, 2)
        server.kill()
        eventually(lambda: not server.relays(), "the relay has sent what it holds and ended")
    arrived = {span.span_id for span in receiver.spans}
    told = [frames.decode_frame(frame) for packet in sent_frames(sent) for frame in frames.frames_in(packet)]
    kept = [frame for frame in told if isinstance(frame, frames.Step) and frame.trace_id]
    assert len({step.rank for step in kept}) == 2
    assert [step.number for step in kept if step.span_id.hex() not in arrived] == []


@pytest.fixture(scope="module")
def npu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Client, Receiver]]:
    """A server whose worker has a simulated NPU, and which does not trace by itself."""
    from tests.helpers.ascend.build import DEFAULT_CACHE, BuildError, build

    try:
        build(DEFAULT_CACHE)
    except BuildError as error:
        pytest.skip(str(error))
    plugins = {"simulated": "tests.helpers.vllm_plugins:simulate_npu"}
    with Receiver() as receiver:
        environment = {**EVERY_STEP, **receiver.grpc_environment, "OTEL_NPU_DEVICE": "npu"}
        with Server(tmp_path_factory.mktemp("npu"), ROOMY, environment, plugins) as server:
            yield Client(server.port), receiver


def test_on_an_npu_a_stage_takes_as_long_as_what_it_launched(npu: tuple[Client, Receiver]) -> None:
    client, receiver = npu
    before = {span.span_id for span in receiver.named(semconv.WORKER_STEP)}
    client.complete(words(5), max_tokens=4)
    steps = [step for step in receiver.wait_for(len(before) + 4, semconv.WORKER_STEP) if step.span_id not in before]
    spans = Spans(receiver.spans)
    for step in steps:
        for stage, nanoseconds in KERNELS_NS.items():
            assert_lasts(spans.child(step, stage), nanoseconds)
        engine_step = spans.parent(step)
        assert engine_step is not None
        assert engine_step.end_ns >= step.end_ns  # though its output was there before


def test_where_vllm_does_not_trace_the_spans_of_a_request_join_its_callers_trace(npu: tuple[Client, Receiver]) -> None:
    client, receiver = npu
    caller = Caller()
    client.complete(words(5), caller.headers(), max_tokens=4)
    eventually(lambda: [s for s in receiver.named(semconv.DECODE) if s.trace_id == caller.trace_id], "decode arrives")
    spans = [span for span in receiver.spans if span.trace_id == caller.trace_id]
    phases = [span for span in spans if span.parent_span_id == caller.span_id]
    assert {span.name for span in phases} == {semconv.QUEUE, semconv.PREFILL, semconv.DECODE}
    decode = next(span for span in phases if span.name == semconv.DECODE)
    assert decode.attributes[semconv.REQUEST_STEPS] == 3
    for stage, nanoseconds in KERNELS_NS.items():
        seconds = decode.attributes[semconv.REQUEST_STAGE_DEVICE_TIME.replace("<name>", stage)]
        assert seconds == pytest.approx(3 * nanoseconds / 1e9, abs=3e-6)


def test_where_neither_vllm_nor_the_caller_traces_there_are_steps_only(npu: tuple[Client, Receiver]) -> None:
    client, receiver = npu
    client.complete(words(5))
    caller = Caller()
    client.complete(words(5), caller.headers())
    eventually(lambda: [s for s in receiver.named(semconv.DECODE) if s.trace_id == caller.trace_id], "decode arrives")
    assert receiver.named(semconv.ENGINE_STEP)
    of_requests = [span for span in receiver.spans if span.name in {semconv.QUEUE, semconv.PREFILL, semconv.DECODE}]
    assert all(span.parent_span_id for span in of_requests)
    assert not receiver.named(LLM_REQUEST)


def assert_lasts(stage: Span, nanoseconds: int) -> None:
    assert stage.attributes[semconv.TIMING] == semconv.TIMING_DEVICE
    assert abs(stage.duration_ns - nanoseconds) <= 1000


def surplus_steps(spans: Spans, request: Span) -> int:
    """How many of a request's steps ran for nothing."""
    return sum(span.attributes.get(semconv.REQUEST_SURPLUS_STEPS, 0) for span in spans.children(request))
