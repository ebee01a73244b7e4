"""What a stage and a step *are*: what they leave behind on the model's thread, for whoever resolves it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Final

from otel_npu.capture import context
from otel_npu.capture.context import NO_RANK, Rank
from otel_npu.capture.plain import BATCH, BATCH_NS, MAX_PENDING
from otel_npu.devices.cpu import HOST_STREAM
from otel_npu.native import native

if TYPE_CHECKING or native is None:
    from otel_npu.capture.plain import (
        CaptureRecord,
        Handle,
        StageRecord,
        StepRecord,
        ThreadRecord,
        last_stages,
        new_stage,
        new_step,
        pack,
        timed,
    )
else:
    CaptureRecord, Handle, ThreadRecord = native.CaptureRecord, native.Handle, native.ThreadRecord
    StageRecord, StepRecord = native.StageRecord, native.StepRecord
    new_stage, new_step = native.new_stage, native.new_step
    last_stages, timed, pack = native.last_stages, native.timed, native.pack
    native.use(context.open_step, context.Ids, NO_RANK, HOST_STREAM, BATCH_NS, MAX_PENDING)

__all__ = [
    "BATCH",
    "BATCH_NS",
    "MAX_PENDING",
    "NO_RANK",
    "STAGE_FIELDS",
    "CaptureRecord",
    "Handle",
    "Rank",
    "StageRecord",
    "StepRecord",
    "ThreadRecord",
    "abandoned",
    "last_stages",
    "new_stage",
    "new_step",
    "pack",
    "timed",
]

STAGE_FIELDS: Final = (
    "attributes",
    "device_ns",
    "duration_ns",
    "entered_ns",
    "error",
    "exited_ns",
    "name",
    "pair",
    "stream",
)


def abandoned(stages: list[Any], index: int) -> bool:
    """Whether a stage is open and will be for ever: nobody but its step holds it any more.

    A `with` statement holds it until it calls its exit. A signal handler that raises just then keeps that from
    happening.
    """
    return not stages[index].exited_ns and _holders(stages, index) <= _NOBODY


def _holders(stages: list[Any], index: int) -> int:
    stage = stages[index]
    return sys.getrefcount(stage)


_NOBODY: Final = _holders([object()], 0)
