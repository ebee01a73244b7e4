"""The hang watch: names the stage in which a device, or the host, is stuck, while it is."""

from __future__ import annotations

import logging
from time import perf_counter_ns
from typing import TYPE_CHECKING

from otel_npu.capture import arguments, context
from otel_npu.capture.resolver import give_up
from otel_npu.wire import frames

if TYPE_CHECKING:
    from collections.abc import Callable

    from otel_npu.capture.records import StageRecord, StepRecord
    from otel_npu.capture.shared import Thread
    from otel_npu.drops import Drops
    from otel_npu.settings import Settings

_log = logging.getLogger("otel_npu")


def watch(thread: Thread, settings: Settings, drops: Drops, send: Callable[[frames.Frame], None]) -> None:
    """Report the thread's oldest step if a stage in it has been unfinished for too long. Hold the thread's lock."""
    step: StepRecord | None = thread.pending[0] if thread.pending else next(iter(list(thread.open.values())), None)
    if step is None or step.hang_reported:
        return
    now_ns = perf_counter_ns()
    hang_ns = settings.hang_seconds * 1e9
    if now_ns - step.opened_ns < hang_ns:
        return
    stage = _unfinished(step)
    if stage is None or now_ns - stage.entered_ns < hang_ns:
        return
    step.hang_reported = True
    _log.error(
        "stage %r of step %d (%s) has been unfinished for %.1f s",
        stage.name,
        step.number,
        step.kind or "step",
        (now_ns - stage.entered_ns) * 1e-9,
    )
    if step.ids is None:
        step.ids = context.new_root() if settings.root_traces else context.NO_IDS
    send(_unfinished_frame(step, step.ids, stage, now_ns))
    if step.closed_ns > 0 and not stage.exited_ns:
        give_up(step, drops)  # its step is over and its exit will never come; do not hold up the others
        step.hang_reported = False  # and there will be no word that it has finished after all


def _unfinished_frame(step: StepRecord, ids: context.Ids, stage: StageRecord, now_ns: int) -> frames.Unfinished:
    return frames.Unfinished(
        ids.trace_id,
        ids.parent_span_id if step.bare else ids.span_id,
        step.number,
        arguments.text(step.kind),
        arguments.text(stage.name),
        stage.entered_ns,
        now_ns,
        stage.stream.device_index,
        step.rank[0],
        ids.span_id,
        b"" if step.rank[0] < 0 else ids.parent_span_id,
    )


def _unfinished(step: StepRecord) -> StageRecord | None:
    """The innermost of the first stages that have not ended."""
    found: StageRecord | None = None
    for stage in list(step.stages):
        inside = found is None or not found.exited_ns or 0 < stage.exited_ns <= found.exited_ns
        if inside and not _ended(stage):
            found = stage
    return found


def _ended(stage: StageRecord) -> bool:
    if not stage.exited_ns:
        return False
    return stage.pair is None or bool(stage.pair.end.query())
