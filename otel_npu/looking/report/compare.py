"""Two runs side by side, stage by stage, with intervals."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

from otel_npu.looking.report.facts import middle, ratio

if TYPE_CHECKING:
    from collections.abc import Sequence

    from otel_npu.looking.report.facts import Facts


def comparison(before: Facts, after: Facts, names: tuple[str, str]) -> str:
    """A table: of each kind of step and each stage the medians of both, and how many times the one the other is."""
    kinds = sorted({*before.kinds, *after.kinds})
    durations = [{name: stage.durations for name, stage in facts.stages.items()} for facts in (before, after)]
    together = {**durations[0], **durations[1]}
    names_of_stages = sorted(together, key=lambda name: -sum(together[name]))
    rows = [
        _rate(before, after),
        *(_row(f"step: {kind}", before.kinds.get(kind, ()), after.kinds.get(kind, ())) for kind in kinds),
        *(_row(name, durations[0].get(name, ()), durations[1].get(name, ())) for name in names_of_stages),
    ]
    this, other = html.escape(names[0] or "this"), html.escape(names[1] or "the other")
    return (
        "<h2>Compared</h2>"
        f'<div class="wide"><table><thead><tr><th></th><th>{other}: median ms (95 %)</th><th>{this}: median ms (95 %)'
        "</th><th>times (95 %)</th><th></th></tr></thead><tbody>" + "".join(rows) + "</tbody></table></div>"
        '<p class="note">The intervals are for medians, whatever the distribution, and take steps as independent: '
        "steps of one run that are alike for another reason make them too narrow.</p>"
    )


def _row(name: str, before: Sequence[float], after: Sequence[float]) -> str:
    times = ratio(before, after)
    cells = [html.escape(name), _middle(before), _middle(after)]
    if times is None:
        cells += ["", "too few to say" if before and after else "only in one"]
        return _cells(cells, "")
    verdict = "slower" if times.low > 1 else "faster" if times.high < 1 else "no difference that can be told"
    cells += [f"{times.value:.3f} ({times.low:.3f} .. {times.high:.3f})", verdict]
    return _cells(cells, verdict if verdict in ("slower", "faster") else "")


def _rate(before: Facts, after: Facts) -> str:
    def rates(facts: Facts) -> str:
        seconds = facts.seconds or 1.0
        return f"{len(facts.model.steps) / seconds:.1f} steps/s, {facts.tokens / seconds:.0f} tokens/s"

    return _cells(["in all", rates(before), rates(after), "", ""], "")


def _middle(values: Sequence[float]) -> str:
    if not values:
        return ""
    found = middle(values)
    return f"{found.value * 1e3:.3f} ({found.low * 1e3:.3f} .. {found.high * 1e3:.3f}), {len(values)} of them"


def _cells(cells: Sequence[str], word: str) -> str:
    *first, last = cells
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in first)}<td class='{word}'>{last}</td></tr>"
