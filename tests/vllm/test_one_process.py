"""vLLM with all of its engine in one process, which is cheap to start: endpoints, environment, missing hook targets."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from otel_npu import semconv
from tests.helpers.receiver import Receiver
from tests.helpers.vllm_server import needs_vllm, run_in_one_process
from tests.helpers.vllm_spans import (
    LLM_REQUEST,
    OURS,
    PHASES,
    Spans,
    assert_consistent,
    assert_phases,
    assert_shares_add_up,
    assert_steps_whole,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.slow, needs_vllm]

GENERATE = """
from vllm import SamplingParams
model = llm(otlp_traces_endpoint={endpoint!r}, disable_log_stats=False)
answers = model.generate({prompts!r}, SamplingParams(max_tokens=4, ignore_eos=True))
assert all(len(answer.outputs[0].token_ids) == 4 for answer in answers)
"""

TRACE_ID, SPAN_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PROMPTS = [f"w{number} w1 w2" for number in range(20)]


def generate(folder: Path, receiver: Receiver, endpoint: str, environment: dict[str, str], prompts: list[str]) -> Spans:
    """All that arrives of a program that generates something for these prompts."""
    run_in_one_process(
        folder,
        GENERATE.format(endpoint=endpoint, prompts=prompts),
        {"OTEL_NPU_STEPS_PER_SECOND": "all", **environment},
    )
    return Spans(receiver.spans)


def test_requests_join_the_trace_of_the_environment_and_the_endpoint_may_have_the_scheme_grpc(
    receiver: Receiver, tmp_path: Path
) -> None:
    environment = {"TRACEPARENT": f"00-{TRACE_ID}-{SPAN_ID}-01"}
    spans = generate(tmp_path, receiver, f"grpc://127.0.0.1:{receiver.grpc_port}", environment, PROMPTS[:2])
    requests = spans.named(LLM_REQUEST)
    assert [(request.trace_id, request.parent_span_id) for request in requests] == [(TRACE_ID, SPAN_ID)] * 2
    for request in requests:
        assert_phases(spans, request)
    assert_in_one_service(spans)
    assert_consistent(spans, {SPAN_ID})
    assert_steps_whole(spans)
    assert_shares_add_up(spans)


def test_the_sampler_chooses_requests_and_the_endpoint_may_have_no_scheme(receiver: Receiver, tmp_path: Path) -> None:
    environment = {"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0.5"}
    spans = generate(tmp_path, receiver, f"127.0.0.1:{receiver.grpc_port}", environment, PROMPTS)
    requests = spans.named(LLM_REQUEST)
    assert 0 < len(requests) < len(PROMPTS)  # but for one time in 500,000
    for request in requests:
        assert int(request.trace_id[16:], 16) < 1 << 63
        assert_phases(spans, request)
    assert len(spans.named(semconv.QUEUE)) == len(requests)
    assert_in_one_service(spans)
    assert_consistent(spans)
    assert_steps_whole(spans)


def assert_in_one_service(spans: Spans) -> None:
    """Our spans and vLLM's own."""
    [service] = {span.resource["service.name"] for span in spans.named(LLM_REQUEST)}
    assert {span.resource["service.name"] for span in spans.ours} == {service}


# One program for all cases: each is a fork of a process that has imported vLLM, so that none imports it again.
# A target is gone as far as a hook can see, while vLLM itself still finds it; one that a base class has too is no
# function any more, and one that Python looks up by itself takes parameters of other names.
BREAK_HOOKS = """
import builtins, functools, json, logging, os, sys, types

from vllm import LLM, SamplingParams
import vllm.v1.core.sched.scheduler, vllm.v1.engine.async_llm, vllm.v1.engine.core, vllm.v1.worker.cpu_worker
import vllm.v1.worker.cpu_model_runner, vllm.model_executor.models.llama
from otel_npu.vllm.plugin import HOOKS
from otel_npu import hooks

def break_target(hook):
    *owners, name = hook.target.split(".")
    module = sys.modules[hook.module]
    owner = functools.reduce(getattr, owners, module)
    function = vars(owner)[name]
    delattr(owner, name)
    if owner is module:
        setattr(builtins, name, function)
    elif name.startswith("__"):
        setattr(owner, name, lambda self, *args, **kwargs: function(self, *args, **kwargs))
    elif hasattr(owner, name):
        setattr(owner, name, property(lambda self: types.MethodType(function, self)))
    else:
        assert not hasattr(owner, "__getattr__")
        def __getattr__(self, wanted):
            if wanted == name:
                return types.MethodType(function, self)
            raise AttributeError(wanted)
        owner.__getattr__ = __getattr__

def serve(case):
    warnings = []
    class Collect(logging.Handler):
        def emit(self, record):
            warnings.append(record.getMessage())
    logging.getLogger("otel_npu").addHandler(Collect(logging.WARNING))
    os.environ.update({"OTEL_NPU_ENABLED": "1", "OTEL_SERVICE_NAME": case})
    model = llm(otlp_traces_endpoint=ENDPOINT, disable_log_stats=False)
    answers = model.generate(["w1 w2 w3", "w4"], SamplingParams(max_tokens=4, ignore_eos=True))
    tokens = [len(answer.outputs[0].token_ids) for answer in answers]
    print("CASE " + json.dumps({"target": case, "tokens": tokens, "warnings": warnings}), flush=True)

def concerns(hook):  # model runner V2 does not run on a CPU
    runs_here = hook.module in sys.modules and not hook.module.startswith("vllm.v1.worker.gpu.")
    return hook.package == "vllm" and runs_here and hooks.applies(hook)

there = [hook for hook in HOOKS if concerns(hook)]
there = [hook for hook in there if not hooks._stands_for_nothing(hook)]
running = {}

def wait_until(most):
    while len(running) > most:
        child, status = os.wait()
        assert status == 0, f"{running[child]} ended with {status}"
        del running[child]

for hook in there:
    wait_until(3)
    sys.stdout.flush()
    child = os.fork()
    if not child:
        break_target(hook)
        serve(hook.target)
        sys.exit()
    running[child] = hook.target
wait_until(0)
"""

# What may be missing where a hook's target is.
WITHOUT = {
    "OutputProcessor.add_request": set(PHASES),
    "OutputProcessor.do_tracing": set(PHASES),
    "Scheduler.__init__": {*PHASES, semconv.ENGINE_STEP},
    "Worker.execute_model": {semconv.PREFILL, semconv.DECODE, semconv.WORKER_STEP, "forward"},
    "record_function_or_nullcontext": {"forward"},
}
ALL = {LLM_REQUEST, *PHASES, semconv.ENGINE_STEP, semconv.WORKER_STEP, "forward"}


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[list[dict[str, Any]], Spans]]:
    """What became of each case, and the spans of all, each in a service of the target's name."""
    with Receiver() as receiver:
        source = f"ENDPOINT = 'http://127.0.0.1:{receiver.grpc_port}'\n{BREAK_HOOKS}"
        off_at_first = {"OTEL_NPU_ENABLED": "0", "OTEL_NPU_STEPS_PER_SECOND": "all"}
        output = run_in_one_process(tmp_path_factory.mktemp("broken"), source, off_at_first)
        cases = [json.loads(line[5:]) for line in output.splitlines() if line.startswith("CASE ")]
        yield cases, Spans(receiver.spans)


def test_vllm_serves_whichever_hook_target_is_missing_and_there_is_one_warning(
    broken: tuple[list[dict[str, Any]], Spans],
) -> None:
    cases, _ = broken
    assert len(cases) >= 10
    for case in cases:
        assert case["tokens"] == [4, 4]
        # A process that has run for a minute, on a busy machine, also says what it has left out meanwhile.
        warnings = [text for text in case["warnings"] if not text.startswith("left out in the last minute")]
        assert len(warnings) == 1, warnings
        assert case["target"] in warnings[0]


def test_whichever_hook_target_is_missing_the_other_spans_arrive(broken: tuple[list[dict[str, Any]], Spans]) -> None:
    cases, all_spans = broken
    for case in cases:
        spans = Spans([span for span in all_spans.all if span.resource["service.name"] == case["target"]])
        names = {span.name for span in spans.all}
        missing = ALL - WITHOUT.get(case["target"], set()) - names
        assert not missing, f"without {case['target']}"
        assert_consistent(spans)
        assert any(span.scope == OURS for span in spans.all)
