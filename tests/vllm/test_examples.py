"""The examples that serve with vLLM, as a user runs them."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.helpers import REPOSITORY
from tests.helpers.receiver import Receiver
from tests.helpers.tiny_model import tiny_model, words
from tests.helpers.traced import eventually
from tests.helpers.vllm_server import ROOMY, Server, free_port, needs_vllm, vllm_environment

if TYPE_CHECKING:
    from tests.helpers.receiver import Span

pytestmark = [pytest.mark.slow, needs_vllm]

needs_instrumentation = pytest.mark.skipif(
    importlib.util.find_spec("opentelemetry.instrumentation") is None
    or importlib.util.find_spec("opentelemetry.instrumentation.fastapi") is None,
    reason="opentelemetry-instrumentation-fastapi is not installed",
)


class ExampleServer(Server):
    """vLLM's server, started by `examples/vllm_server.sh`."""

    def command(self) -> list[str]:
        # vLLM's command asks for the version of the distribution "vllm", which its CPU build is not,
        # and infers from it that it is the CPU build.
        information = self.folder / "site" / "vllm-0.32.0.dist-info"
        information.mkdir(exist_ok=True)
        (information / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")
        script = REPOSITORY / "examples" / "vllm_server.sh"
        return [str(script), str(tiny_model()), *self.usual_arguments()]


@needs_instrumentation
def test_the_caller_and_the_server_make_one_trace_from_the_call_to_the_stage(tmp_path: Path) -> None:
    with Receiver() as receiver:
        otlp = f"http://127.0.0.1:{receiver.grpc_port}"
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        environment = {"OTLP_ENDPOINT": otlp, "PATH": path, "OTEL_NPU_ENABLED": None}
        with ExampleServer(tmp_path, ROOMY, environment) as server:
            answer = call_through_fastapi(tmp_path, server.port, receiver)
            eventually(lambda: "otel-npu is on: " in server.log, "the log says that it is on")
            log = server.log
        assert answer.split("w")[1:]
        on = [line.partition("otel-npu is on: ")[2] for line in log.splitlines() if "otel-npu is on: " in line]
        kept = "2 steps a second of each kind are kept as traces, and slow ones"
        clock = "stages are timed by the host's clock, for there is no device"
        assert on == [f"{clock}; spans go to {otlp} (grpc); {kept}"]
        spans = {span.span_id: span for span in receiver.spans}
        forward = next(span for span in spans.values() if names(spans, span)[:2] == ["forward", "prefill"])
        assert names(spans, forward)[2] == "llm_request"
        assert names(spans, forward)[-1] == "GET /complete"
        assert {spans[forward.span_id].resource["service.name"]} == {"vllm"}


def call_through_fastapi(folder: Path, vllm_port: int, receiver: Receiver) -> str:
    """Start the caller, call it once, and end it."""
    port = free_port()
    caller = subprocess.Popen(
        [
            *(sys.executable, str(REPOSITORY / "examples" / "fastapi_caller.py")),
            *("--vllm", f"http://127.0.0.1:{vllm_port}", "--port", str(port)),
        ],
        env={**vllm_environment(folder), **receiver.grpc_environment, "OTEL_SERVICE_NAME": "caller"},
    )
    url = f"http://127.0.0.1:{port}/complete?tokens=4&prompt={words(5).replace(' ', '%20')}"
    answers: list[str] = []

    def ask() -> bool:
        assert caller.poll() is None, "the caller has ended"
        try:
            with urllib.request.urlopen(url, timeout=60) as response:
                answers.append(response.read().decode())
        except OSError:  # it does not listen yet
            return False
        return True

    try:
        eventually(ask, "the caller answers", 60)
    finally:
        caller.terminate()
        caller.wait(20)
    return answers[0]


def names(spans: dict[str, Span], span: Span) -> list[str]:
    """The names from this span up to its root."""
    found = [span.name]
    while span.parent_span_id:
        span = spans[span.parent_span_id]
        found.append(span.name)
    return found


def test_offline_inference(tmp_path: Path) -> None:
    with Receiver() as receiver:
        done = subprocess.run(
            [
                *(sys.executable, "-W", "ignore", str(REPOSITORY / "examples" / "offline_inference_npu.py")),
                *("--model", str(tiny_model()), "--tokens", "4", "--max-model-len", "512", "--enforce-eager"),
                *("--otlp-endpoint", f"http://127.0.0.1:{receiver.grpc_port}"),
            ],
            env={**vllm_environment(tmp_path), "VLLM_CPU_KVCACHE_SPACE": "1"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        assert done.stdout.count("' -> '") == 3
        requests = {span.span_id for span in receiver.named("llm_request")}
        assert len(requests) == 3
        assert {span.parent_span_id for span in receiver.named("prefill")} == requests
        assert {span.parent_span_id for span in receiver.named("decode")} == requests
