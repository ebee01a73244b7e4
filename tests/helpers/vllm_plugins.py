"""vLLM plugins of the tests' own, for what a CPU does not do by itself. vLLM loads them in each of its processes."""

from __future__ import annotations

import functools
import os
import struct
import sys
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

FRAMES_FOLDER: Final = "TESTS_FRAMES_FOLDER"
"""The variable that says where `record_sent_frames` writes."""

KERNELS_NS: Final = {"prepare_input": 300_000, "forward": 2_000_000, "sample": 500_000}
"""How long the one kernel of each stage takes on the simulated NPU."""

_LENGTH: Final = struct.Struct("I")
_done: set[str] = set()


def unforce_async_scheduling() -> None:
    """Schedule a step while the one before it runs, which vLLM does not do on a CPU by itself."""
    from vllm.platforms.cpu import CpuPlatform

    if not _first("unforce_async_scheduling"):
        return
    check = CpuPlatform.check_and_update_config

    def unforced(cls: Any, config: Any) -> None:
        check(config)
        config.scheduler_config.async_scheduling = True

    CpuPlatform.check_and_update_config = classmethod(unforced)


def mend_the_interpreter() -> None:
    """Let Triton's interpreter take masks that are no flags, as n-gram speculation's kernels have them."""
    if not _first("mend_the_interpreter"):
        return
    from triton.runtime.interpreter import InterpreterBuilder

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def masked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        mask.data = mask.data.astype(bool)
        return load(self, pointers, mask, *rest)

    def masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        mask.data = mask.data.astype(bool)
        return store(self, pointers, value, mask, *rest)

    InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = masked_load, masked_store


def simulate_npu() -> None:
    """In each worker the real torch_npu on the simulated runtime, with one kernel in each of some stages.

    The device is held until a step's launches are over, so a kernel waits for no launch, and what lies between its
    stage's two events is the kernel to the nanosecond.
    """
    if not _first("simulate_npu"):
        return
    from vllm.v1.worker.cpu_worker import CPUWorker
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner
    from vllm.v1.worker.gpu_worker import Worker

    npu = _Npu()
    _around(CPUWorker, "init_device", before=npu.load)
    _around(Worker, "execute_model", before=npu.hold)
    _around(Worker, "sample_tokens", after=npu.release)
    for method, stage in (("_prepare_inputs", "prepare_input"), ("_model_forward", "forward"), ("_sample", "sample")):
        _around(GPUModelRunner, method, before=functools.partial(npu.launch, KERNELS_NS[stage]))


def record_sent_frames() -> None:
    """Write each frame that has gone into the relay's socket to a file of the process's own, as it went."""
    if not _first("record_sent_frames"):
        return
    from otel_npu.wire.channel import Channel

    transmit = Channel._transmit
    log = os.open(f"{os.environ[FRAMES_FOLDER]}/{os.getpid()}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def recorded(self: Channel, frame: bytes) -> bool:
        sent = transmit(self, frame)
        if sent:
            os.write(log, _LENGTH.pack(len(frame)) + frame)
        return sent

    Channel._transmit = recorded  # type: ignore[method-assign]


def sent_frames(folder: Path) -> Iterator[bytes]:
    """What `record_sent_frames` has written, of all processes. A frame that was cut off is left out."""
    for path in folder.iterdir():
        rest = path.read_bytes()
        while len(rest) >= _LENGTH.size:
            [length] = _LENGTH.unpack(rest[: _LENGTH.size])
            frame, rest = rest[_LENGTH.size : _LENGTH.size + length], rest[_LENGTH.size + length :]
            if len(frame) == length:
                yield frame


class _Npu:
    """The simulated NPU of one worker."""

    def __init__(self) -> None:
        self._held: int | None = None

    def load(self, *_: object) -> None:
        """Bring torch_npu into this process: not earlier, or vLLM's processes without a device would have it too."""
        from tests.helpers.ascend.simulator import Simulator

        sys.modules.pop("torch_npu", None)  # that it isn't there was for transformers
        self._simulator = Simulator.load()
        import torch
        import torch_npu  # noqa: F401

        self._npu = torch.npu
        self._npu.set_device(0)
        self._npu._sleep(1)  # the first operator of a process waits for its own launch; later ones don't

    def hold(self, _worker: object, scheduler_output: Any, *_: object) -> None:
        """Let the device wait, if a step begins that runs the model."""
        if scheduler_output.total_num_scheduled_tokens:
            self._held = self._simulator.hold(self._npu.current_stream().npu_stream)

    def launch(self, nanoseconds: int, *_: object) -> None:
        """Launch a kernel of this length, in a step."""
        if self._held is not None:
            self._npu._sleep(nanoseconds)

    def release(self, *_: object) -> None:
        """Let the device run."""
        if self._held is not None:
            self._simulator.release(self._held)
            self._held = None


def _around(
    owner: Any, name: str, *, before: Callable[..., None] | None = None, after: Callable[..., None] | None = None
) -> None:
    """Call these with the arguments of each call of a method."""
    method = getattr(owner, name)

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        if before is not None:
            before(*args)
        try:
            return method(*args, **kwargs)
        finally:
            if after is not None:
                after(*args)

    setattr(owner, name, call)


def _first(name: str) -> bool:
    """Whether this is the first time: vLLM may load its plugins again."""
    first = name not in _done
    _done.add(name)
    return first
