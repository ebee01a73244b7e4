"""One page that needs nothing but itself: text, tables, and figures that Plotly draws."""

from __future__ import annotations

import html
import json
from importlib import resources
from typing import TYPE_CHECKING, Any, Final

from otel_npu import semconv
from otel_npu._version import __version__
from otel_npu.looking.model import Model
from otel_npu.looking.report.compare import comparison
from otel_npu.looking.report.facts import Facts, median, quantile, request_row
from otel_npu.looking.report.timeline import Timeline

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence, Sized

    from otel_npu.looking.span import Span

_SHOWN_STEPS: Final = 20
_SHOWN_REQUESTS: Final = 60
_SHOWN_STAGES: Final = 40
_ROW_PIXELS: Final = 30
_IDLE_COLOUR: Final = "#d0d7de55"

_PAGE: Final = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:">
<link rel="icon" href="data:,"><title>{title}</title><style>{css}</style></head><body>
<header><div><h1>{title}</h1><p>{about}</p></div><button id="theme">light / dark</button></header>
<p class="sentence">{sentence}</p>
{body}
<script type="application/json" id="figures">{figures}</script>
<script type="text/plain" id="columns">{columns}</script>
<script type="text/plain" id="details">{details}</script>
<script>{plotly}</script><script>{script}</script></body></html>
"""


class MissingLibraryError(Exception):
    """Plotly is not installed; the message says what to do."""


def page(spans: Sequence[Span], other: Sequence[Span] = (), names: tuple[str, str] = ("", "")) -> str:
    """The page of these spans, beside others if there are any.

    Args:
        spans: In any order, of any number of files.
        other: What they are compared with: the run before.
        names: What the two are called.

    Raises:
        MissingLibraryError: Plotly is not here.
    """
    plotly = _plotly()
    model = Model(spans)
    facts = Facts(model)
    figures: dict[str, Any] = {}
    timeline = Timeline(model)
    sections = [_where(facts, figures)]
    if other:
        sections.append(comparison(Facts(Model(other)), facts, names))
    if timeline.count:
        sections += [_timeline(timeline), _slowest(model, timeline.zero_ns), _stages(facts, figures), _ranks(facts)]
    if model.requests:
        sections.append(_requests(model, figures))
    folder = resources.files(__package__)
    return _PAGE.format(
        title=html.escape(f"otel-npu: {names[0] or _services(spans)}"),
        about=html.escape(_about(model, facts)),
        sentence=html.escape(facts.sentence()),
        css=(folder / "page.css").read_text(),
        body="\n".join(filter(None, sections)),
        figures=_embedded(figures),
        columns=timeline.columns() if timeline.count else "",
        details=timeline.details() if timeline.count else "",
        plotly=plotly,
        script=(folder / "page.js").read_text(),
    )


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], attributes: Sequence[str] = ()) -> str:
    """A table, without the columns in which nothing is; `attributes` are those of each row, as HTML."""
    filled = list(rows)
    used = [number for number in range(len(head)) if any(row[number] not in (None, "") for row in filled)]
    head, rows = [head[number] for number in used], [[row[number] for number in used] for row in filled]
    body = "".join(
        f"<tr {attributes[number] if attributes else ''}>{''.join(f'<td>{_cell(cell)}</td>' for cell in row)}</tr>"
        for number, row in enumerate(rows)
    )
    heads = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    return f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(cell: Any) -> str:
    return "" if cell is None else html.escape(f"{cell:.3f}" if isinstance(cell, float) else str(cell))


def _plotly() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise MissingLibraryError("a report needs Plotly: pip install 'otel-npu[report]'") from None
    return str(get_plotlyjs()).replace("</script", "<\\/script")


def _embedded(value: Any) -> str:
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def _services(spans: Sequence[Span]) -> str:
    return ", ".join(sorted({str(span.resource.get(semconv.SERVICE_NAME, "")) for span in spans} - {""})) or "report"


def _about(model: Model, facts: Facts) -> str:
    hosts = sorted({str(span.resource.get(semconv.HOST_NAME, "")) for span in model.spans} - {""})
    where = f" on {', '.join(hosts)}" if hosts else ""
    return (
        f"{_many(model.steps, 'step')} of {_many(facts.ranks, 'rank')}{where}, {_many(model.requests, 'request')}, "
        f"{_many(model.spans, 'span')}; otel-npu {__version__}"
    )


def _many(things: Sized, noun: str) -> str:
    return f"{len(things)} {noun}{'' if len(things) == 1 else 's'}"


def _where(facts: Facts, figures: dict[str, Any]) -> str:
    """The picture of where the time of each rank went."""
    if not facts.ranks:
        return ""
    ranks = list(facts.ranks.values())
    together = sorted(facts.stages.items(), key=lambda item: -item[1].outermost)
    traces: list[dict[str, Any]] = [
        {
            "type": "bar",
            "orientation": "h",
            "name": name,
            "y": [rank.name for rank in ranks],
            "x": [100 * rank.stages.get(name, 0.0) / (rank.seconds or 1) for rank in ranks],
            "hovertemplate": f"{name}: %{{x:.1f}} %<extra>%{{y}}</extra>",
        }
        for name, stage in together[:10]
        if stage.outermost
    ]
    traces.append(
        {
            "type": "bar",
            "orientation": "h",
            "name": "in no stage",
            "colour": _IDLE_COLOUR,
            "y": [rank.name for rank in ranks],
            "x": [max(0.0, 100 * (1 - rank.busy / (rank.seconds or 1))) for rank in ranks],
            "hovertemplate": "in no stage: %{x:.1f} %<extra>%{y}</extra>",
        }
    )
    height = 130 + _ROW_PIXELS * len(ranks)
    figures["where"] = {"traces": traces, "x": "% of the time", "stacked": True, "height": height}
    return '<h2>Where the time went</h2><div id="where"></div>'


def _timeline(timeline: Timeline) -> str:
    return (
        "<h2>Timeline</h2>"
        f'<p class="note">{timeline.count} spans. Drag or scroll to zoom, click a span to see what it says. '
        '<button id="all">all</button></p>'
        '<div class="look"><div id="timeline"></div><div id="detail">Click a span.</div></div>'
    )


def _slowest(model: Model, zero_ns: int) -> str:
    steps = sorted(model.steps, key=lambda step: -step.duration_ns)[:_SHOWN_STEPS]
    rows, attributes = [], []
    for step in steps:
        says = step.attributes
        longest = max(
            (stage for run in step.runs for stage in run.stages if model.parent(stage) is run.span),
            key=lambda stage: stage.duration_ns,
            default=None,
        )
        skew, idle = says.get(semconv.STEP_SKEW), says.get(semconv.STEP_IDLE)
        rows.append(
            (
                f"{step.kind} {says.get(semconv.STEP_NUMBER, '')}",
                step.duration_ns * 1e-6,
                says.get(semconv.STEP_TOKENS),
                says.get(semconv.STEP_REQUESTS),
                "" if longest is None else f"{longest.name} {longest.duration_ns * 1e-6:.3f}",
                None if idle is None else idle * 1e3,
                says.get(semconv.STEP_STRAGGLER),
                None if skew is None else skew * 1e3,
            )
        )
        span = step.spans[0]
        attributes.append(f'data-start="{span.start_ns - zero_ns}" data-took="{span.duration_ns}"')
    head = ("step", "ms", "tokens", "requests", "longest stage, ms", "idle before, ms", "straggler", "skew, ms")
    return f"<h2>Slowest steps</h2>{table(head, rows, attributes)}"


def _stages(facts: Facts, figures: dict[str, Any]) -> str:
    stages = sorted(facts.stages.items(), key=lambda item: -sum(item[1].durations))[:_SHOWN_STAGES]
    traces, rows = [], []
    whole = sum(stage.outermost for stage in facts.stages.values()) or 1.0
    for name, stage in stages:
        ordered = sorted(stage.durations)
        p1, p25, p50, p75, p99 = (quantile(ordered, share) * 1e3 for share in (0.01, 0.25, 0.5, 0.75, 0.99))
        least = 1e-6  # on a logarithmic axis nothing is 0
        traces.append(
            {
                "type": "box",
                "orientation": "h",
                "name": name,
                "y": [name],
                "lowerfence": [max(least, p1)],
                "q1": [max(least, p25)],
                "median": [max(least, p50)],
                "q3": [max(least, p75)],
                "upperfence": [max(least, p99)],
            }
        )
        host = f"{median(stage.host) * 1e3:.3f}" if stage.host else ""
        share = f"{sum(stage.durations) / whole:.1%}"
        rows.append((name, len(ordered), share, p50, p99, ordered[-1] * 1e3, host))
    height = 80 + _ROW_PIXELS * len(traces)
    figures["stages"] = {
        "traces": traces,
        "x": "ms: 1st, 25th, 50th, 75th and 99th percentile",
        "log": True,
        "height": height,
    }
    head = ("stage", "uses", "share", "p50 ms", "p99 ms", "longest ms", "host p50 ms")
    return f'<h2>Stages</h2><div id="stages"></div>{table(head, rows)}'


def _ranks(facts: Facts) -> str:
    rows = []
    for rank in facts.ranks.values():
        whole = rank.seconds or 1.0
        ordered = sorted(rank.skews)
        rows.append(
            (
                rank.name,
                rank.steps,
                f"{rank.busy / whole:.1%}",
                None if rank.idle is None else f"{rank.idle / whole:.1%}",
                f"{rank.launch_bound / rank.judged:.1%} of {rank.judged}" if rank.judged else None,
                rank.straggles,
                quantile(ordered, 0.5) * 1e3 if ordered else None,
                quantile(ordered, 0.99) * 1e3 if ordered else None,
                median(rank.uncertainties) * 1e6 if rank.uncertainties else None,
            )
        )
    head = (
        *("rank", "steps", "busy", "idle", "launch-bound"),
        *("straggled", "skew p50 ms", "skew p99 ms", "clock uncertainty p50 us"),
    )
    return f"<h2>Ranks</h2>{table(head, rows)}"


def _requests(model: Model, figures: dict[str, Any]) -> str:
    rows = sorted(map(request_row, model.requests), key=lambda row: -row["seconds"])
    shown = rows[:_SHOWN_REQUESTS]
    bars = shown[:30]
    figures["requests"] = {
        "traces": [
            {
                "type": "bar",
                "orientation": "h",
                "name": name,
                "y": [row["name"] for row in bars],
                "x": [(row[name] or 0.0) * 1e3 for row in bars],
            }
            for name in ("queue", "kv", "prefill", "decode")
        ],
        "x": "ms",
        "stacked": True,
        "height": 130 + 20 * len(bars),
    }
    keys = ("seconds", "queue", "kv", "prefill", "decode", "device", "share")
    cells = [
        (row["name"], *(None if row[key] is None else row[key] * 1e3 for key in keys), row["steps"] or None)
        for row in shown
    ]
    head = (
        *("request", "ms", "queue ms", "KV ms", "prefill ms", "decode ms"),
        *("device time ms", "its share of it ms", "steps"),
    )
    more = f'<p class="note">The {len(shown)} longest of {len(rows)}.</p>' if len(rows) > len(shown) else ""
    return f'<h2>Requests</h2><div id="requests"></div>{more}{table(head, cells)}'
