"""Each example runs as its own text says, and is seen at the receiver."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.conftest import REPOSITORY

if TYPE_CHECKING:
    from tests.receiver import Receiver


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
def test_decode_loop(receiver: Receiver) -> None:
    environment = {**receiver.grpc_environment, "OTEL_NPU_ENABLED": "1", "OTEL_NPU_STEPS_PER_SECOND": "all"}
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "examples/decode_loop.py"), "--tokens", "20"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "decoded 20 tokens on cpu" in done.stdout
    receiver.wait_for(20 * 4)
    steps = {span.span_id: span for span in receiver.named("worker_step")}
    assert sorted(span.attributes["npu.step.kind"] for span in steps.values()) == ["decode"] * 19 + ["prefill"]
    forward = {span.span_id for span in receiver.named("forward") if span.parent_span_id in steps}
    assert {span.parent_span_id for span in receiver.named("attention")} == forward
    assert len(forward) == len(receiver.named("sample")) == 20
