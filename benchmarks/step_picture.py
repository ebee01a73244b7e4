"""Draws where the time of a step goes, a bar for each revision and device (`benchmarks.step_cost --picture`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from pathlib import Path


class Bar(NamedTuple):
    """A step: what it is called, what it costs as a whole (us), and what its parts cost where they were timed."""

    name: str
    cost_us: float
    parts: dict[str, float]


_COLOURS: Final = (
    "#4c78a8", "#72b7b2", "#9ecae9", "#bab0ac", "#e4a94b", "#f58518", "#e45756", "#b279a2", "#c7c7c7", "#7a4d84",
)  # fmt: skip


def draw(bars: list[Bar], path: Path) -> None:
    """Draw the bars, the first on top. Parts are drawn in proportion, so that together they are as long as the whole.

    Args:
        bars: With the same parts each.
        path: Where the picture is written; its ending says what kind it is.
    """
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update({"svg.hashsalt": "otel-npu", "svg.fonttype": "none", "font.family": "sans-serif"})
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 1.6 + 0.5 * len(bars)), layout="constrained")
    names = [bar.name for bar in bars]
    left = [0.0] * len(bars)
    for part, colour in zip(bars[0].parts, _COLOURS, strict=False):
        lengths = [bar.parts[part] / sum(bar.parts.values()) * bar.cost_us for bar in bars]
        if any(lengths):
            axes.barh(names, lengths, left=left, color=colour, label=part, height=0.65)
        left = [start + length for start, length in zip(left, lengths, strict=True)]
    for index, bar in enumerate(bars):
        axes.text(bar.cost_us, index, f" {bar.cost_us:.0f} us", va="center")
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel("processor time of the model's thread, us a step of six stages, caches cold")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize="small")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
