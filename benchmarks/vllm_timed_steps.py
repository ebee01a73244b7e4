"""A vLLM plugin for `benchmarks.vllm_cost`: a device that works while the host waits, and how long the host does not.

Nothing on the CPU works beside the host, so the time that a step would take on a device is slept.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from pathlib import Path
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

FOLDER: Final = "TIMED_STEPS_FOLDER"
DEVICE_MS: Final = "TIMED_STEPS_DEVICE_MS"
WORKER: Final = "worker"
ENGINE: Final = "engine"
_TOTALS: Final = struct.Struct("qq")


class Totals(NamedTuple):
    """Nanoseconds on the host, without what was slept, and steps, since the process started."""

    nanoseconds: int
    steps: int


def totals(folder: Path, role: str) -> Totals:
    """What the process of this role has counted so far."""
    path = folder / role
    return Totals(*_TOTALS.unpack(path.read_bytes())) if path.exists() else Totals(0, 0)


def register() -> None:
    """Time all calls of a step from outside of all hooks, and sleep in the forward."""
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.worker.cpu_worker import CPUWorker
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner
    from vllm.v1.worker.gpu_worker import Worker

    if hasattr(EngineCore, "_timed_steps"):
        return
    EngineCore._timed_steps = True
    worker, engine = _Timer(WORKER), _Timer(ENGINE)
    check, forward = CpuPlatform.check_and_update_config, GPUModelRunner._model_forward

    # As on an NPU, the engine's process runs its one worker. On a CPU vLLM gives it a process of its own, and both
    # wait for each other by spinning: on few processors that is most of what one measures.
    def in_one_process(_: Any, config: Any) -> None:
        check(config)
        config.parallel_config.distributed_executor_backend = "uni"

    def work_on_device(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        worker.sleep(float(os.environ[DEVICE_MS]) / 1000)
        return output

    CpuPlatform.check_and_update_config = classmethod(in_one_process)
    GPUModelRunner._model_forward = work_on_device

    # Both look it up at each call, so that whatever is put round it later is inside.
    def execute_model(self: Any, scheduler_output: Any) -> Any:
        return Worker.execute_model(self, scheduler_output)

    def sample_tokens(self: Any, grammar_output: Any) -> Any:
        return Worker.sample_tokens(self, grammar_output)

    CPUWorker.execute_model = worker.timed(execute_model, begins_step=lambda _, output: _runs_the_model(output))
    CPUWorker.sample_tokens = worker.timed(sample_tokens)
    after_the_scheduler = EngineCore._initialize_effective_attention_block_size

    def call(self: Any) -> Any:
        scheduler = self.scheduler
        scheduler.add_request = engine.timed(scheduler.add_request)
        scheduler.schedule = engine.timed(scheduler.schedule)
        scheduler.update_from_output = engine.timed(
            scheduler.update_from_output, begins_step=lambda output, _: _runs_the_model(output)
        )
        return after_the_scheduler(self)

    EngineCore._initialize_effective_attention_block_size = call


def _runs_the_model(scheduler_output: Any) -> bool:
    return bool(scheduler_output.total_num_scheduled_tokens)


class _Timer:
    """Adds up in a file that others can read at any time."""

    def __init__(self, role: str) -> None:
        self._path = Path(os.environ[FOLDER], role)
        self._file: mmap.mmap | None = None
        self._nanoseconds = self._steps = 0

    def timed(
        self, function: Callable[..., Any], *, begins_step: Callable[..., bool] = lambda *_: False
    ) -> Callable[..., Any]:
        """The same function; what it takes is added, and a step if this call begins one."""

        def call(*args: Any, **kwargs: Any) -> Any:
            began = perf_counter_ns()
            try:
                return function(*args, **kwargs)
            finally:
                self._nanoseconds += perf_counter_ns() - began
                self._steps += begins_step(*args)
                self._write()

        return call

    def sleep(self, seconds: float) -> None:
        """Sleep inside of what is timed; that does not count."""
        if seconds:
            began = perf_counter_ns()
            time.sleep(seconds)
            self._nanoseconds -= perf_counter_ns() - began

    def _write(self) -> None:
        if self._file is None:
            with self._path.open("w+b") as file:
                file.write(bytes(_TOTALS.size))
                file.flush()
                self._file = mmap.mmap(file.fileno(), _TOTALS.size)
        _TOTALS.pack_into(self._file, 0, self._nanoseconds, self._steps)
