"""What a stage and a step *are*: what they leave behind on the model's thread, for whoever resolves it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from otel_npu.capture import context
from otel_npu.capture.plain import BATCH_NS, BATCH_STEPS
from otel_npu.native import native

if TYPE_CHECKING or native is None:
    from otel_npu.capture.plain import Handle, StageRecord, StepRecord, ThreadRecord, new_stage, pack
else:
    Handle, StageRecord, StepRecord = native.Handle, native.StageRecord, native.StepRecord
    ThreadRecord, new_stage, pack = native.ThreadRecord, native.new_stage, native.pack
    native.use(context.open_step, context.Ids, BATCH_STEPS, BATCH_NS)

__all__ = [
    "BATCH_NS",
    "BATCH_STEPS",
    "NO_RANK",
    "STAGE_FIELDS",
    "Handle",
    "Rank",
    "StageRecord",
    "StepRecord",
    "ThreadRecord",
    "abandoned",
    "new_stage",
    "pack",
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


class Rank(NamedTuple):
    """Which of an engine's workers a step ran on, and whether that one's output is what the engine waits for."""

    number: int
    returns_output: bool


NO_RANK: Final[Rank] = Rank(-1, returns_output=False)


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
