"""Each example runs as its own text says, and is seen at the receiver."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.helpers import REPOSITORY

if TYPE_CHECKING:
    from pathlib import Path

    from tests.helpers.receiver import Receiver


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed"),
]


def run(example: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "examples" / example), *arguments],
        env={**os.environ, "OTEL_NPU_ENABLED": "1", "OTEL_NPU_STEPS_PER_SECOND": "all", **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


def test_torch_loop(receiver: Receiver) -> None:
    done = run("torch_loop.py", "--tokens", "20", **receiver.grpc_environment)
    assert "decoded 20 tokens on cpu" in done.stdout
    receiver.wait_for(20 * 4)
    steps = {span.span_id: span for span in receiver.named("worker_step")}
    assert sorted(span.attributes["npu.step.kind"] for span in steps.values()) == ["decode"] * 19 + ["prefill"]
    forward = {span.span_id for span in receiver.named("forward") if span.parent_span_id in steps}
    assert {span.parent_span_id for span in receiver.named("attention")} == forward
    assert len(forward) == len(receiver.named("sample")) == 20


def test_from_profile_execute_duration(receiver: Receiver) -> None:
    done = run("from_profile_execute_duration.py", OTEL_NPU_LOG_STAGES="1", **receiver.grpc_environment)
    receiver.wait_for(3 * 2 + 3 * 3)
    assert sum(line.startswith("[prepare input]") for line in done.stdout.splitlines()) == 3
    assert done.stderr.count("Profile execute duration [Decode]: [prepare_input]") == 3
    steps = {span.span_id for span in receiver.named("worker_step")}
    assert [span.parent_span_id in steps for span in receiver.named("prepare_input")] == [True] * 3
    assert len(receiver.named("prepare input")) == 3


@pytest.mark.skipif(importlib.util.find_spec("rotel") is None, reason="the collector rotel is not installed")
def test_collector_to_file(tmp_path: Path) -> None:
    file = tmp_path / "spans.txt"
    program = (sys.executable, str(REPOSITORY / "examples/torch_loop.py"), "--tokens", "5")
    done = run("collector_to_file.py", str(file), "--", *program)
    assert f"the spans are in {file}" in done.stdout
    assert file.read_text().count("Name           : worker_step") == 5
