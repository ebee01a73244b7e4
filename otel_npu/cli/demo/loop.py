"""What the demo traces: the steps of an inference engine, on a simulated NPU."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING, Final

import otel_npu

if TYPE_CHECKING:
    from otel_npu.devices.simulated import SimulatedNpu

_PREFILL_EVERY: Final = 25  # steps, the first one included
_SLOW_AT: Final = 0.6  # of the run
_SLOW_FACTOR: Final = 6
_HOST_SECONDS: Final = 0.0003  # scheduling and detokenising between two steps
_SPREAD: Final = 0.02
# How a forward divides into what is inside it.
_ATTENTION, _MLP, _ALL_REDUCE = 0.34, 0.55, 0.11


class InferenceLoop:
    """Runs steps one after the other; the same seed gives the same stage times.

    Args:
        npu: Where the stages run.
        seed: Of prompt lengths, batch sizes and noise.
        steps: How many there will be. One decode of them is slow: its all-reduce waits for a late peer.
    """

    def __init__(self, npu: SimulatedNpu, seed: int, steps: int) -> None:
        self._npu = npu
        self._random = random.Random(seed)  # noqa: S311  noise, not secrets
        self._steps = steps
        self._done = 0

    def run_step(self) -> None:
        """Run the next step, until its tokens are there."""
        self._done += 1
        position = (self._done - 1) % self._steps + 1
        if position % _PREFILL_EVERY == 1:
            tokens = self._random.randint(512, 4096)
            with otel_npu.step("prefill", tokens=tokens):
                self._stages(forward_ms=14 + 0.0112 * tokens)
        else:
            sequences = self._random.randint(8, 32)
            with otel_npu.step("decode", sequences=sequences):
                self._stages(forward_ms=8.7 + 0.1 * sequences, slow=position == self._slow_position())
        self._npu.synchronize()
        time.sleep(_HOST_SECONDS)

    def _slow_position(self) -> int:
        position = max(2, round(self._steps * _SLOW_AT))
        return position + 1 if position % _PREFILL_EVERY == 1 else position

    def _stages(self, *, forward_ms: float, slow: bool = False) -> None:
        wait_ms = (_SLOW_FACTOR - 1) * forward_ms if slow else 0.0
        with otel_npu.stage("prepare_input"):
            self._launch(0.6)
        with otel_npu.stage("forward"):
            with otel_npu.stage("attention"):
                self._launch(_ATTENTION * forward_ms)
            with otel_npu.stage("mlp"):
                self._launch(_MLP * forward_ms)
            with otel_npu.stage("all_reduce"):
                self._launch(_ALL_REDUCE * forward_ms + wait_ms)
        with otel_npu.stage("post_process"):
            self._launch(0.3)
        with otel_npu.stage("sample"):
            self._launch(0.4)

    def _launch(self, milliseconds: float) -> None:
        self._npu.launch(round(milliseconds * 1e6 * max(0.5, self._random.gauss(1, _SPREAD))))
