"""vLLM's model runner V2, which marks no scopes: what its hooks catch, on its real code, and on a server of its own.

Its kernels are Triton's, whose interpreter runs them on the CPU: a step takes a tenth of a second and more.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from otel_npu import semconv
from tests.helpers.receiver import Receiver
from tests.helpers.tiny_model import words
from tests.helpers.vllm_client import Caller, Client, at_once
from tests.helpers.vllm_mix import MIX, MIX_SEQUENCES, assert_mix, mixed_request
from tests.helpers.vllm_server import ROOMY, Server, needs_v2, needs_vllm, vllm_environment
from tests.helpers.vllm_spans import Spans, requests_of, steps_of

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Iterator

pytestmark = [pytest.mark.slow, needs_vllm]

FORWARD = {"self.model", "self.ubatch_runner.run", "self.cudagraph_manager.run_pw_graph"}
BESIDE = {"self.cudagraph_manager.run_fullgraph"}


def test_each_way_to_run_the_forward_is_in_its_context_or_hooked_itself() -> None:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).with_name("v1") / "worker" / "gpu" / "model_runner.py"
    (execute_model,) = (
        node
        for node in ast.walk(ast.parse(source.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name == "execute_model"
    )
    (context,) = (
        node
        for node in ast.walk(execute_model)
        if isinstance(node, ast.With) and "set_forward_context" in ast.unparse(node.items[0].context_expr)
    )
    everywhere, inside = called(execute_model), called(context)
    assert everywhere >= (FORWARD | BESIDE)
    assert inside & (FORWARD | BESIDE) == FORWARD


def called(node: ast.AST) -> set[str]:
    return {ast.unparse(call.func) for call in ast.walk(node) if isinstance(call, ast.Call)}


PROGRAM = """
import json, types
from unittest import mock

import torch
from vllm.plugins import load_general_plugins

load_general_plugins()
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.v1.worker.gpu import cudagraph_utils, model_runner

import otel_npu
from otel_npu.capture import switch
from otel_npu.vllm import worker
from tests.helpers.capturing import capturing


class Worker:
    rank = 0
    vllm_config = types.SimpleNamespace(
        parallel_config=types.SimpleNamespace(tensor_parallel_size=1, world_size=1, data_parallel_rank=0)
    )
    model_runner = types.SimpleNamespace()

    @worker.around_execute_model
    def execute_model(self, scheduler_output):
        run()


def run():
    description = cudagraph_utils.BatchExecutionDescriptor(
        cg_mode=CUDAGraphMode.FULL, num_tokens=1, num_reqs=1
    )
    manager = object.__new__(cudagraph_utils.ModelCudaGraphManager)
    manager.graphs = {description: mock.Mock()}
    manager.is_last_pp_rank, manager.use_aux_hidden_state_outputs = True, False
    manager.hidden_states = torch.zeros(4, 2)
    assert manager.run_fullgraph(description).shape == (1, 2)
    manager.graphs[description].replay.assert_called_once()
    with model_runner.set_forward_context(None, VllmConfig(), cudagraph_runtime_mode=CUDAGraphMode.NONE):
        pass
    for name in ("prepare_inputs", "prepare_attn", "sample", "postprocess_sampled"):
        try:
            getattr(model_runner.GPUModelRunner, name)(mock.Mock(), *[mock.Mock()] * 3)
        except Exception:
            pass  # it is what the method is called for that counts here


with capturing() as captured:
    Worker().execute_model(types.SimpleNamespace(total_num_scheduled_tokens=1, num_scheduled_tokens={"a": 1}))
    step = captured.step()
print(json.dumps([[stage.name for stage in step.stages], step.attributes["npu.graph.mode"]]))
"""


def test_its_methods_are_stages(run_program: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    done = run_program(PROGRAM, {**vllm_environment(tmp_path), "OTEL_NPU_DEVICE": "cpu"})
    names, mode = json.loads(done.stdout.splitlines()[-1])
    assert names == ["forward", "forward", "prepare_input", "prepare_attention", "sample", "post_process"]
    assert mode == "none"


MIXED_REQUESTS = 100
NGRAM = '{"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}'
STAGES = ["prepare_input", "prepare_attention", "forward", "sample", "post_process", "draft"]


@dataclass
class Serving:
    """The server of this module, its client, and the receiver of its spans."""

    server: Server
    client: Client
    receiver: Receiver


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """A server with model runner V2, which drafts tokens by what the prompt and the answer have had before."""
    with Receiver() as receiver:
        endpoint = f"http://127.0.0.1:{receiver.grpc_port}"
        arguments = [*ROOMY, "--max-num-seqs", "16", "--otlp-traces-endpoint", endpoint, "--speculative-config", NGRAM]
        plugins = {"mended": "tests.helpers.vllm_plugins:mend_the_interpreter"}
        environment = {"OTEL_NPU_STEPS_PER_SECOND": "all"}
        with Server(tmp_path_factory.mktemp("v2"), arguments, environment, plugins, v2=True) as server:
            yield Serving(server, Client(server.port), receiver)


@needs_v2
def test_its_steps_have_the_stages_that_those_of_v1_have(serving: Serving) -> None:
    caller = Caller()
    serving.client.complete(words(5), caller.headers(), max_tokens=4)
    requests_of(serving.receiver, lambda span: span.trace_id == caller.trace_id)
    spans = steps_of(serving.receiver)
    assert spans.worker_steps
    for step in spans.worker_steps:
        assert spans.names(step) == STAGES
        assert step.attributes[semconv.GRAPH_MODE] == "none"


@needs_v2
def test_what_it_drafted_and_accepted_is_what_the_servers_own_metrics_say(serving: Serving) -> None:
    callers = [Caller() for _ in range(12)]
    at_once(
        [
            functools.partial(serving.client.complete, words(3, number) * 2, caller.headers(), max_tokens=12)
            for number, caller in enumerate(callers)
        ],
        len(callers),
    )
    traces = {caller.trace_id for caller in callers}
    requests_of(serving.receiver, lambda span: span.trace_id in traces, len(callers))
    spans = steps_of(serving.receiver)
    for metric, of_step, of_request in (
        ("spec_decode_num_draft_tokens", semconv.STEP_DRAFTED_TOKENS, semconv.REQUEST_DRAFTED_TOKENS),
        ("spec_decode_num_accepted_tokens", semconv.STEP_ACCEPTED_TOKENS, semconv.REQUEST_ACCEPTED_TOKENS),
    ):
        counted = serving.client.counted(metric)
        assert counted > 0
        assert sum(span.attributes.get(of_step, 0) for span in spans.named(semconv.ENGINE_STEP)) == counted
        assert sum(span.attributes.get(of_request, 0) for span in spans.ours) == counted


@needs_v2
def test_of_mixed_requests_on_it_nothing_is_missing_twice_or_out_of_place(serving: Serving) -> None:
    """As on model runner V1, over all that the server has sent since it started, with fewer requests."""
    callers = [Caller() for _ in range(MIXED_REQUESTS)]
    at_once([functools.partial(mixed_request, serving.client, *numbered) for numbered in enumerate(callers)], 16)
    traces = {caller.trace_id for caller in callers}
    requests_of(serving.receiver, lambda span: span.trace_id in traces, MIXED_REQUESTS * MIX_SEQUENCES // MIX)
    steps_of(serving.receiver)
    serving.server.stop()
    assert_mix(Spans(serving.receiver.spans), callers)
