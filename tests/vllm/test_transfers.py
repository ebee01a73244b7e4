"""KV cache from elsewhere, on real vLLM: loads in a step and beside it, loads that fail, prefill and decode apart.

vLLM's own example connector loads inside the step. One made of it, `WaitingConnector`, lets the request wait.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from otel_npu import semconv
from tests.helpers.receiver import Receiver
from tests.helpers.tiny_model import words
from tests.helpers.vllm_client import Caller, Client
from tests.helpers.vllm_server import ROOMY, Server, needs_vllm, run_in_one_process
from tests.helpers.vllm_spans import LLM_REQUEST, Spans, assert_consistent, requests_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.helpers.receiver import Span

pytestmark = [pytest.mark.slow, needs_vllm]

PROMPT_TOKENS = 200
FOUND_TOKENS = 128  # of blocks of 128
LOAD_SECONDS = 0.3

# One program for all cases: each is a fork of a process that has imported vLLM, so that none imports it again. In each
# the second prompt is the first again.
CASES = """
import os, sys, time
from vllm import LLM, SamplingParams
import vllm.v1.core.sched.scheduler, vllm.v1.engine.core, vllm.v1.worker.cpu_worker, vllm.v1.worker.cpu_model_runner
import vllm.model_executor.models.llama

def connector(name, folder, **extra):
    elsewhere = {"kv_connector_module_path": "tests.helpers.vllm_connectors"} if name == "WaitingConnector" else {}
    policy = {"kv_load_failure_policy": extra.pop("policy")} if "policy" in extra else {}
    extra["shared_storage_path"] = os.path.join(os.getcwd(), folder)
    return {"kv_connector": name, "kv_role": "kv_both", "kv_connector_extra_config": extra, **elsewhere, **policy}

CASES = {
    "cached": None,
    "in_step": connector("ExampleConnector", "a"),
    "waiting": connector("WaitingConnector", "b", load_seconds=LOAD_SECONDS, keep_seconds=0.1),
    "failing": connector("WaitingConnector", "c", load_seconds=0.05, fail=True, policy="recompute"),
    "refusing": connector("WaitingConnector", "d", load_seconds=0.05, fail=True, policy="fail"),
}

def serve(case, transfer):
    os.environ.update({"OTEL_NPU_ENABLED": "1", "OTEL_SERVICE_NAME": case})
    model = llm(
        otlp_traces_endpoint=ENDPOINT,
        disable_log_stats=False,
        kv_transfer_config=transfer,
        enable_prefix_caching=case == "cached",
    )
    for prompt in (PROMPT, PROMPT, "w1 w2"):
        model.generate([prompt], SamplingParams(max_tokens=3, ignore_eos=True), use_tqdm=False)
        time.sleep(0.2)

running = 0
for case, transfer in CASES.items():
    if running == 2:
        assert os.wait()[1] == 0
        running -= 1
    sys.stdout.flush()
    if not os.fork():
        serve(case, transfer)
        sys.exit()
    running += 1
for _ in range(running):
    assert os.wait()[1] == 0
"""


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Spans]]:
    """What arrived of each case."""
    with Receiver() as receiver:
        given = {
            "ENDPOINT": f"http://127.0.0.1:{receiver.grpc_port}",
            "PROMPT": words(PROMPT_TOKENS),
            "LOAD_SECONDS": LOAD_SECONDS,
        }
        source = "".join(f"{name} = {value!r}\n" for name, value in given.items()) + CASES
        environment = {"OTEL_NPU_ENABLED": "0", "OTEL_NPU_STEPS_PER_SECOND": "all"}
        run_in_one_process(tmp_path_factory.mktemp("transfers"), source, environment, seconds=400)
        services = {span.resource["service.name"] for span in receiver.spans}
        yield {
            service: Spans([span for span in receiver.spans if span.resource["service.name"] == service])
            for service in services
        }


def second_request(spans: Spans) -> Span:
    return sorted(spans.named(LLM_REQUEST), key=lambda span: span.start_ns)[1]


def first_phase(spans: Spans) -> dict[str, Any]:
    return dict(spans.child(second_request(spans), semconv.PREFILL).attributes)


def test_all_that_arrives_is_consistent(cases: dict[str, Spans]) -> None:
    assert len(cases) == 5
    for spans in cases.values():
        assert len(spans.named(LLM_REQUEST)) == 3
        assert_consistent(spans)


def test_tokens_that_the_engines_cache_had_are_said_of_the_request_and_the_step(cases: dict[str, Spans]) -> None:
    said = first_phase(cases["cached"])
    assert said[semconv.REQUEST_CACHED_TOKENS] == FOUND_TOKENS
    assert said[semconv.REQUEST_FETCHED_TOKENS] == 0
    steps = cases["cached"].named(semconv.ENGINE_STEP)
    assert sum(step.attributes.get(semconv.STEP_CACHED_TOKENS, 0) for step in steps) == FOUND_TOKENS


@pytest.mark.parametrize("case", ["in_step", "waiting"])
def test_tokens_from_elsewhere_are_said_of_the_request_and_the_step(cases: dict[str, Spans], case: str) -> None:
    said = first_phase(cases[case])
    assert said[semconv.REQUEST_CACHED_TOKENS] == FOUND_TOKENS
    assert said[semconv.REQUEST_FETCHED_TOKENS] == FOUND_TOKENS
    steps = cases[case].named(semconv.ENGINE_STEP)
    assert sum(step.attributes.get(semconv.STEP_FETCHED_TOKENS, 0) for step in steps) == FOUND_TOKENS


def test_a_load_inside_a_step_is_a_stage_of_the_workers_in_its_forward_and_of_no_other_step(
    cases: dict[str, Spans],
) -> None:
    spans = cases["in_step"]
    [step] = [step for step in spans.worker_steps if semconv.KV_LOAD in names_below(spans, step)]
    assert spans.names(spans.child(step, "forward")) == [semconv.KV_LOAD]
    assert semconv.KV_LOAD not in spans.names(second_request(spans))


def test_a_request_that_waits_has_kv_load_between_queue_and_prefill(cases: dict[str, Spans]) -> None:
    spans = cases["waiting"]
    request = second_request(spans)
    queue, load, prefill = (spans.child(request, name) for name in (semconv.QUEUE, semconv.KV_LOAD, semconv.PREFILL))
    assert load.attributes[semconv.KV_TOKENS] == FOUND_TOKENS
    assert load.attributes[semconv.KV_CONNECTOR] == "WaitingConnector"
    assert load.duration_ns * 1e-9 >= LOAD_SECONDS
    assert queue.end_ns == load.start_ns
    assert load.end_ns <= prefill.start_ns


def test_blocks_that_are_kept_for_somebody_else_are_kv_send_until_they_are_free(cases: dict[str, Spans]) -> None:
    spans = cases["waiting"]
    first = min(spans.named(LLM_REQUEST), key=lambda span: span.start_ns)
    send = spans.child(first, semconv.KV_SEND)
    assert send.duration_ns * 1e-9 >= 0.1
    assert send.start_ns >= spans.child(first, semconv.DECODE).start_ns


def test_a_load_that_failed_is_marked_and_its_tokens_are_computed(cases: dict[str, Spans]) -> None:
    spans = cases["failing"]
    request = second_request(spans)
    load = spans.child(request, semconv.KV_LOAD)
    assert load.attributes[semconv.ERROR_TYPE] == semconv.KV_LOAD_FAILED
    assert load.status == 2
    assert first_phase(spans)[semconv.REQUEST_FETCHED_TOKENS] == 0
    assert spans.names(request) == [semconv.QUEUE, semconv.KV_LOAD, semconv.PREFILL, semconv.DECODE]


def test_a_request_that_ends_because_its_load_failed_says_so(cases: dict[str, Spans]) -> None:
    spans = cases["refusing"]
    request = second_request(spans)
    assert spans.names(request) == [semconv.QUEUE, semconv.KV_LOAD]
    assert spans.child(request, semconv.KV_LOAD).attributes[semconv.ERROR_TYPE] == semconv.KV_LOAD_FAILED
    assert spans.child(request, semconv.QUEUE).attributes[semconv.REQUEST_FINISH_REASON] == "error"


def names_below(spans: Spans, span: Span) -> list[str]:
    return [below.name for below in spans.descendants(span)]


def test_prefill_and_decode_on_two_servers_are_one_trace(tmp_path: Path, receiver: Receiver) -> None:
    def transfer(role: str, **extra: float) -> list[str]:
        config = {
            "kv_connector": "WaitingConnector",
            "kv_connector_module_path": "tests.helpers.vllm_connectors",
            "kv_role": role,
            "kv_connector_extra_config": {"shared_storage_path": str(tmp_path / "kv"), **extra},
        }
        endpoint = f"http://127.0.0.1:{receiver.grpc_port}"
        usual = [*ROOMY, "--no-enable-prefix-caching", "--otlp-traces-endpoint", endpoint]
        return [*usual, "--kv-transfer-config", json.dumps(config)]

    # The threads of two servers that wait for each other by spinning would keep each other from the processors.
    one_thread = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    servers = [
        Server(tmp_path / name, transfer(role, **extra), {"OTEL_SERVICE_NAME": name, **one_thread})
        for name, role, extra in (
            ("prefill", "kv_producer", {"keep_seconds": 0.4}),
            ("decode", "kv_consumer", {"load_seconds": LOAD_SECONDS}),
        )
    ]
    caller = Caller()
    try:
        for server in servers:
            server.start()
        for server, tokens in zip(servers, (1, 4), strict=True):
            server.wait_until_ready()
            Client(server.port).complete(words(PROMPT_TOKENS), caller.headers(), max_tokens=tokens)
        spans, requests = requests_of(receiver, lambda span: span.trace_id == caller.trace_id, 2)
        for server in servers:
            server.stop()
    finally:
        for server in servers:
            server.kill()
    spans = Spans([span for span in receiver.spans if span.trace_id == caller.trace_id])
    prefill, decode = sorted(requests, key=lambda span: span.start_ns)
    assert [request.parent_span_id for request in requests] == [caller.span_id] * 2
    assert Counter(spans.names(prefill)) == Counter([semconv.QUEUE, semconv.PREFILL, semconv.KV_SEND])
    assert spans.names(decode) == [semconv.QUEUE, semconv.KV_LOAD, semconv.PREFILL, semconv.DECODE]
    for earlier, later in itertools.pairwise(spans.children(decode)):
        assert earlier.end_ns <= later.end_ns
    assert {span.resource["service.name"] for span in spans.descendants(prefill)} == {"prefill"}
    assert {span.resource["service.name"] for span in spans.descendants(decode)} == {"decode"}
