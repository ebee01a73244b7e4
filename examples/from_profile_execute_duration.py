"""Moving from vllm-ascend's `ProfileExecuteDuration`, in code that uses it to time its own stages.

The first loop is as it was written for vllm-ascend: one import is other, and its stages are spans as well. The second
says the same with stages and steps, and does not wait for the device any more.

    OTEL_NPU_ENABLED=1 python examples/from_profile_execute_duration.py
"""

from __future__ import annotations

import logging

import torch

import otel_npu
from otel_npu import ProfileExecuteDuration  # was: from vllm_ascend.utils import ProfileExecuteDuration

_STEPS = 3


def before(model: torch.nn.Module, tokens: torch.Tensor) -> None:
    """Waits for the device in every step, because it asks for the durations there."""
    for _ in range(_STEPS):
        with ProfileExecuteDuration().capture_async("prepare input"):
            batch = tokens.clone()
        with ProfileExecuteDuration().capture_async("forward"):
            model(batch)
        durations = ProfileExecuteDuration().pop_captured_sync()
        print(" ".join(f"[{tag}]:{milliseconds:.2f}ms" for tag, milliseconds in durations.items()))


def after(model: torch.nn.Module, tokens: torch.Tensor) -> None:
    """Waits for nothing. With OTEL_NPU_LOG_STAGES=1 the line is logged all the same, once the device has finished."""
    for _ in range(_STEPS):
        with otel_npu.step("decode"):
            with otel_npu.stage("prepare_input"):
                batch = tokens.clone()
            with otel_npu.stage("forward"):
                model(batch)


def main() -> None:
    """Run both."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    device = "npu" if hasattr(torch, "npu") else "cpu"
    model = torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.ReLU(), torch.nn.Linear(512, 512)).to(device)
    tokens = torch.randn(64, 512, device=device)
    with torch.inference_mode():
        before(model, tokens)
        after(model, tokens)


if __name__ == "__main__":
    main()
