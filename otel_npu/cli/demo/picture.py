"""Draws steps as a waterfall and their stages as a table, in whatever terminal there is."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from rich import box
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from otel_npu.cli.demo.steps import percentile, stage_times

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from otel_npu.cli.demo.steps import Outlier, StageSpan, TracedStep

WIDTH: Final = 96
_MARGIN: Final = 2
_NUMBER_WIDTH: Final = 9
_MIN_BARS: Final = 12
_TICK_COLUMNS: Final = 12  # at least, between two ticks of the axis

# By whether a stage is an outer one, the glyphs of its bar: a whole cell, its left half, its right half. Stages inside
# others are drawn half as high.
_BLOCKS: Final = {True: ("█", "▌", "▐"), False: ("▄", "▖", "▗")}
_PLAIN: Final = {True: ("=", "=", "="), False: ("-", "-", "-")}

_OUTER_STYLE, _INNER_STYLE, _SLOW_STYLE = "cyan", "blue", "yellow"
_QUIET: Final = "bright_black"


def waterfall(
    steps: Sequence[TracedStep], outlier: Outlier | None, width: int, *, unicode: bool = True
) -> Iterator[Text]:
    """The lines of a picture of some steps, all to one scale, each from its own start.

    Args:
        steps: What to draw.
        outlier: Which of them is the slow one; what made it slow stands out.
        width: Columns to draw in. Where there is no room for bars the numbers stay.
        unicode: Whether block characters can be shown.
    """
    labels = max(len(_label(stage.path)) for step in steps for stage in step.stages)
    columns = width - 2 * _MARGIN - labels - 1 - _NUMBER_WIDTH
    if columns < _MIN_BARS:
        columns = 0
    span_ms = max(step.ms for step in steps)
    indent = " " * (_MARGIN + labels + 1)
    if columns:
        yield Text(indent + _axis(span_ms, columns) + "ms".rjust(_NUMBER_WIDTH), _QUIET)
    slow = {id(stage.span) for stage, _ in outlier.stages} if outlier else set()
    for step in steps:
        room = len(indent) + columns
        title = f"{' ' * _MARGIN}{_title(step)}"[:room].ljust(room)
        yield Text(f"{title}{step.ms:{_NUMBER_WIDTH}.2f}", "bold")
        for stage in step.stages:
            yield _line(stage, step, labels, columns, span_ms, slow=id(stage.span) in slow, unicode=unicode)
        yield Text()


def explain(outlier: Outlier) -> Text:
    """In words, where the slow step spent its time."""
    step = outlier.step
    if not outlier.stages:
        return Text(f"The slowest step is number {step.number}, a {step.kind}; no single stage made it so.")
    (stage, usual), *inner = outlier.stages
    text = Text.assemble(
        f"Step {step.number}, a {step.kind}, was slow in ",
        (stage.path[-1], _SLOW_STYLE),
        f": {stage.ms:.1f} ms where {usual:.1f} ms is usual, {stage.ms / usual:.1f} times as long",
    )
    for within, usual_ms in inner:
        text.append(f"; {within.ms:.1f} ms of that in ")
        text.append(within.path[-1], _SLOW_STYLE)
        text.append(f", usually {usual_ms:.1f} ms")
    return text.append(".")


def stage_table(steps: Sequence[TracedStep], width: int) -> Padding:
    """Count, mean, p50 and p99 of each stage, by kind of step; in a narrow place only the last of these."""
    labels = max(len(_label(stage.path)) for step in steps for stage in step.stages)
    figures = max(1, min(4, (width - _MARGIN - labels) // (_NUMBER_WIDTH + 1)))
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style=_QUIET, padding=(0, 1))
    table.add_column("stage", no_wrap=True)
    for heading in ("count", "mean ms", "p50 ms", "p99 ms")[-figures:]:
        table.add_column(heading, justify="right", min_width=_NUMBER_WIDTH - 1, no_wrap=True)
    for kind, stages in stage_times(steps).items():
        whole = [step.ms for step in steps if step.kind == kind]
        table.add_row(kind, *_figures(whole)[-figures:], style="bold")
        for path, times in stages.items():
            table.add_row(_label(path), *_figures(times)[-figures:])
    return Padding(table, (0, 0, 0, _MARGIN), expand=False)


def _figures(times: Sequence[float]) -> list[str]:
    figures = (sum(times) / len(times), percentile(times, 0.5), percentile(times, 0.99))
    return [f"{len(times):,}", *(f"{figure:.2f}" for figure in figures)]


def _title(step: TracedStep) -> str:
    own = step.span.attributes
    work = f"{own['tokens']:,} tokens" if "tokens" in own else f"{own.get('sequences', '?')} sequences"
    return f"step {step.number}  {step.kind}, {work}"


def _label(path: tuple[str, ...]) -> str:
    return "  " * len(path) + path[-1]


def _line(
    stage: StageSpan,
    step: TracedStep,
    labels: int,
    columns: int,
    span_ms: float,
    *,
    slow: bool,
    unicode: bool,
) -> Text:
    outer = len(stage.path) == 1
    style = _SLOW_STYLE if slow else _OUTER_STYLE if outer else _INNER_STYLE
    glyphs = (_BLOCKS if unicode else _PLAIN)[outer]
    start_ms = (stage.span.start_ns - step.span.start_ns) * 1e-6
    bar = _bar(start_ms / span_ms, stage.ms / span_ms, columns, glyphs)
    return Text.assemble(
        " " * _MARGIN,
        (_label(stage.path).ljust(labels + 1), "" if outer else _QUIET),
        (bar, style),
        (f"{stage.ms:.2f}".rjust(_NUMBER_WIDTH), style if slow else "" if outer else _QUIET),
    )


def _bar(start: float, length: float, columns: int, glyphs: tuple[str, str, str]) -> str:
    """A bar to half a cell, never shorter than that: a stage that ran is seen."""
    if not columns:
        return ""
    whole, left_half, right_half = glyphs
    first = min(round(start * 2 * columns), 2 * columns - 1)
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
