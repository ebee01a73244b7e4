"""Draws a request's trace as a waterfall, in whatever terminal there is."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from rich.text import Text

from otel_npu import semconv
from otel_npu.cli.demo.front_end import LLM_REQUEST

if TYPE_CHECKING:
    from collections.abc import Iterator

    from otel_npu.cli.demo.receiver import Span
    from otel_npu.cli.demo.traces import Slow, Traces

WIDTH: Final = 96
_MARGIN: Final = 2
_NUMBER_WIDTH: Final = 9
_MIN_BARS: Final = 12
_TICK_COLUMNS: Final = 12  # at least, between two ticks of the axis
_LEAST_SHARE: Final = 0.05  # of the request: what is shorter has no row, for the picture is to fit in 24 of them

# A bar's whole cell, its left half, its right half; phases are drawn whole, what is in them half as high.
_BLOCKS: Final = {True: ("█", "▌", "▐"), False: ("▄", "▖", "▗")}
_PLAIN: Final = {True: ("=", "=", "="), False: ("-", "-", "-")}

_REQUEST_STYLE, _PHASE_STYLE, _INNER_STYLE, _SLOW_STYLE = "magenta", "cyan", "blue", "yellow"
_QUIET: Final = "bright_black"
_PHASES: Final = (semconv.QUEUE, semconv.PREFILL, semconv.DECODE)
_STEPS: Final = (semconv.PREFILL_STEP, semconv.DECODE_STEP, semconv.OTHER_STEPS)


def waterfall(traces: Traces, slow: Slow, width: int, *, unicode: bool = True) -> Iterator[Text]:
    """The lines of a picture of the slowest request: its phases, their steps, and the stages of the slow step.

    Args:
        traces: What arrived.
        slow: Which request, and what made it slow: that stands out.
        width: Columns to draw in. Where there is no room for bars the numbers stay.
        unicode: Whether block characters can be shown.
    """
    rows = list(_rows(traces, slow))
    labels = max(len(_label(depth, span)) for depth, span in rows)
    columns = width - 2 * _MARGIN - labels - 1 - _NUMBER_WIDTH
    if columns < _MIN_BARS:
        columns = 0
    request = slow.request
    if columns:
        yield Text(" " * (_MARGIN + labels + 1) + _axis(request.ms, columns) + "ms".rjust(_NUMBER_WIDTH), _QUIET)
    marked = {span.span_id for span in (slow.step, *slow.stages)}
    for depth, span in rows:
        is_slow = span.span_id in marked
        style = _style(span, is_slow=is_slow)
        glyphs = (_BLOCKS if unicode else _PLAIN)[span.name in (LLM_REQUEST, *_PHASES)]
        start_ms = (span.start_ns - request.start_ns) * 1e-6
        yield Text.assemble(
            " " * _MARGIN,
            (_label(depth, span).ljust(labels + 1), style if is_slow else ""),
            (_bar(start_ms / request.ms, span.ms / request.ms, columns, glyphs), style),
            (f"{span.ms:.2f}".rjust(_NUMBER_WIDTH), style if is_slow else ""),
        )


def explain(slow: Slow) -> Text:
    """In words, what vLLM's own span says of the request, and what ours do."""
    request, step, stage = slow.request, slow.step, slow.stages[-1]
    return Text.assemble(
        f"Request {request.attributes[semconv.RESPONSE_ID]} took {request.ms:.0f} ms. ",
        (LLM_REQUEST, _REQUEST_STYLE),
        f", vLLM's own span, says only that; what is below says where: one decode step took {step.ms:.0f} ms "
        f"({slow.usual_ms:.0f} is usual), ",
        (f"{stage.ms:.0f} of them {stage.name}", _SLOW_STYLE),
        " on the NPU.",
    )


def _rows(traces: Traces, slow: Slow) -> Iterator[tuple[int, Span]]:
    yield 0, slow.request
    least_ms = slow.request.ms * _LEAST_SHARE
    for phase in traces.children(slow.request):
        yield 1, phase
        for step in traces.children(phase):
            if step.ms >= least_ms and step.name in _STEPS:
                yield 2, step
            if step is slow.step:
                yield from _stages(traces, step, 3, least_ms)


def _stages(traces: Traces, around: Span, depth: int, least_ms: float) -> Iterator[tuple[int, Span]]:
    for stage in traces.children(around):
        if stage.ms >= least_ms:
            yield depth, stage
            yield from _stages(traces, stage, depth + 1, least_ms)


def _label(depth: int, span: Span) -> str:
    steps = span.attributes[semconv.REQUEST_STEPS] if span.name == semconv.OTHER_STEPS else None
    return "  " * depth + (span.name if steps is None else f"{span.name}, {steps}")


def _style(span: Span, *, is_slow: bool) -> str:
    if is_slow:
        return _SLOW_STYLE
    if span.name == LLM_REQUEST:
        return _REQUEST_STYLE
    return _PHASE_STYLE if span.name in _PHASES else _INNER_STYLE


def _bar(start: float, length: float, columns: int, glyphs: tuple[str, str, str]) -> str:
    """A bar to half a cell, never shorter than that: a stage that ran is seen."""
    if not columns:
        return ""
    whole, left_half, right_half = glyphs
    first = min(max(0, round(start * 2 * columns)), 2 * columns - 1)
    last = max(first + 1, min(round((start + length) * 2 * columns), 2 * columns))
    cells = [" "] * columns
    for cell in range(first // 2, (last + 1) // 2):
        left, right = first <= 2 * cell < last, first <= 2 * cell + 1 < last
        cells[cell] = whole if left and right else left_half if left else right_half
    return "".join(cells)


def _axis(span_ms: float, columns: int) -> str:
    """Ticks at round numbers of milliseconds, each beginning where its time is."""
    least = span_ms * _TICK_COLUMNS / columns
    magnitude = 10.0 ** math.floor(math.log10(least))
    tick_ms = next(factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude >= least)
    axis = ""
    for tick in range(int(span_ms / tick_ms) + 1):
        column = round(tick * tick_ms / span_ms * columns)
        label = f"{tick * tick_ms:g}"
        if column + len(label) <= columns:
            axis = axis.ljust(column) + label
    return axis.ljust(columns)
