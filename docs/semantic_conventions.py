"""`python -m docs.semantic_conventions >docs/semantic-conventions.md`: the page, from `otel_npu/semconv.py`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from otel_npu import semconv
from otel_npu.vllm import stages

if TYPE_CHECKING:
    from collections.abc import Iterable


def page() -> str:
    """The page's text."""
    return "\n".join(
        [
            "# Semantic conventions",
            "",
            "Generated from [`otel_npu/semconv.py`](../otel_npu/semconv.py) by",
            "`python -m docs.semantic_conventions >docs/semantic-conventions.md`.",
            "",
            f"Every span has the instrumentation scope `{semconv.SCOPE}`, the schema URL `{semconv.SCHEMA_URL}` and",
            "the kind INTERNAL. Keys of our own begin with `npu.`; the others are OpenTelemetry's or vLLM's. Units are",
            "UCUM's; a name without one is a text, a flag or a number without a unit.",
            "",
            "## Spans",
            "",
            *_table("span", semconv.SPANS),
            "",
            "## Events",
            "",
            *_table("event", semconv.EVENTS),
            "",
            "## Attributes",
            "",
            *_table("attribute", semconv.ATTRIBUTES, units=True),
            "",
            "## Metrics",
            "",
            "Of every step, kept as a trace or not. Their resource is the service; its instance is the relay's. An",
            "attribute stands on a point where it is known. Buckets of times reach from 10 us to 10 s.",
            "",
            *_metrics(),
            "",
            "## Reasons for what was left out",
            "",
            f"Counted in `{semconv.DROPPED_PREFIX}<reason>` and in the metric `{semconv.DROPS.name}`.",
            "",
            *_table("reason", semconv.DROP_REASONS, units=True),
            "",
            "## Stages under vLLM",
            "",
            "What vLLM and vllm-ascend call their stages in each version becomes one of these names;",
            f"`{semconv.RAW_NAME}` keeps what it was. Those timed by the host put no work on the model's stream.",
            "",
            *_stages(),
            "",
        ]
    )


def _table(what: str, terms: Iterable[semconv.Term], *, units: bool = False) -> list[str]:
    rows = [[what, "unit", "meaning"]]
    rows += [[f"`{term.name}`", f"`{term.unit}`" if term.unit else "", _escaped(term.meaning)] for term in terms]
    return _lines(rows if units else [[name, meaning] for name, _unit, meaning in rows])


def _metrics() -> list[str]:
    rows = [["metric", "instrument", "unit", "meaning", "attributes"]]
    rows += [
        [
            f"`{metric.name}`",
            metric.kind,
            f"`{metric.unit}`",
            _escaped(metric.meaning),
            ", ".join(f"`{name}`" for name in metric.attributes),
        ]
        for metric in semconv.METRICS
    ]
    return _lines(rows)


def _stages() -> list[str]:
    raw: dict[tuple[str, str], list[str]] = {}
    for name, entry in stages.STAGES.items():
        if entry.timing is not stages.IGNORED:
            raw.setdefault((entry.name, entry.timing.value), []).append(name)
    rows = [["stage", "timed by", "called"]]
    rows += [
        [f"`{name}`", timing, ", ".join(f"`{_escaped(each)}`" for each in names)]
        for (name, timing), names in sorted(raw.items())
    ]
    return _lines(rows)


def _lines(rows: list[list[str]]) -> list[str]:
    head, *rest = rows
    return [f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rest]]


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    sys.stdout.write(page())
