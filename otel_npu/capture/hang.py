"""The hang watch: names the stage in which a device, or the host, is stuck, while it is."""

from __future__ import annotations

import logging
from time import perf_counter_ns
from typing import TYPE_CHECKING

from otel_npu.capture import context
from otel_npu.capture.resolver import give_up
from otel_npu.wire import frames

if TYPE_CHECKING:
    from otel_npu.capture.stages import Stage
    from otel_npu.capture.steps import Step, ThreadState
    from otel_npu.drops import Drops
    from otel_npu.settings import Settings
    from otel_npu.wire.channel import Channel

_log = logging.getLogger("otel_npu")


def watch(state: ThreadState, settings: Settings, channel: Channel, drops: Drops) -> None:
    """Report the thread's oldest step if a stage in it has been unfinished for too long. Hold the state's lock."""
    step = state.pending[0] if state.pending else state.step
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
    channel.send(frames.encode(_unfinished_frame(step, step.ids, stage, now_ns)))
    if step.closed_ns > 0 and not stage.exited_ns:
        give_up(step, drops)  # its step is over and its exit will never come; do not hold up the others
        step.hang_reported = False  # and there will be no word that it has finished after all


def _unfinished_frame(step: Step, ids: context.Ids, stage: Stage, now_ns: int) -> frames.Unfinished:
    return frames.Unfinished(
        ids.trace_id,
        ids.parent_span_id if step.bare else ids.span_id,
        step.number,
        step.kind,
        stage.name,
        stage.entered_ns,
        now_ns,
        stage.stream.device_index,
        step.rank.number,
        ids.span_id,
        b"" if step.rank.number < 0 else ids.parent_span_id,
    )


def _unfinished(step: Step) -> Stage | None:
    """The innermost of the first stages that have not ended."""
    found: Stage | None = None
    for stage in list(step.stages):
        inside = found is None or not found.exited_ns or 0 < stage.exited_ns <= found.exited_ns
        if inside and not _ended(stage):
            found = stage
    return found


def _ended(stage: Stage) -> bool:
    if not stage.exited_ns:
        return False
    return stage.pair is None or bool(stage.pair.end.query())
