"""The timeline's data: spans in rows, as columns that a browser reads at once, and what each says, for a click."""

from __future__ import annotations

import base64
import gzip
import json
from typing import TYPE_CHECKING, Any, Final

from otel_npu.looking.report.facts import rank_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from otel_npu.looking.model import Model, Run
    from otel_npu.looking.span import Span

_MAX_DEPTH: Final = 4
_MAX_ROWS: Final = 3
"""Rows side by side for what overlaps; what is beyond them lies over the last."""


class Timeline:
    """The spans of a model in rows: the engine's steps, and of each rank its steps, its stages, those in these, ...

    Args:
        model: The steps.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self.rows: list[str] = []
        self._names: dict[str, int] = {}
        self._columns: dict[str, list[int]] = {"start": [], "took": [], "row": [], "name": []}
        self._details: list[Any] = []
        self.zero_ns = model.steps[0].start_ns if model.steps else 0
        self._fill()

    @property
    def count(self) -> int:
        """How many spans there are."""
        return len(self._details)

    def columns(self) -> str:
        """Of each span its start and length in nanoseconds, its row and name by number; packed."""
        return packed({**self._columns, "rows": self.rows, "names": list(self._names)})

    def details(self) -> str:
        """Of each span what it says; packed."""
        return packed(self._details)

    def _fill(self) -> None:
        engines = [step.engine for step in self._model.steps if step.engine is not None]
        self._add("engine", engines)
        runs: dict[str, list[Run]] = {}
        for step in self._model.steps:
            for run in step.runs:
                runs.setdefault(rank_name(run), []).append(run)
        for name in sorted(runs, key=_by_number):
            self._add(name, [run.span for run in runs[name] if run.span not in run.stages])
            by_depth: list[list[Span]] = [[] for _ in range(_MAX_DEPTH)]
            for run in runs[name]:
                for stage in run.stages:
                    by_depth[min(self._depth(stage, run), _MAX_DEPTH - 1)].append(stage)
            for depth, stages in enumerate(by_depth):
                self._add(f"{name} stages" if not depth else f"{name} stages, inside {depth}", stages)

    def _depth(self, stage: Span, run: Run) -> int:
        depth, at = 0, self._model.parent(stage)
        while at is not None and at is not run.span and depth < _MAX_DEPTH:
            depth, at = depth + 1, self._model.parent(at)
        return depth

    def _add(self, name: str, spans: Sequence[Span]) -> None:
        """These spans, in as many rows of this name as they need."""
        rows: list[int] = []
        ends_ns: list[int] = []
        for span in sorted(spans, key=lambda span: span.start_ns):
            free = next((row for row, end_ns in enumerate(ends_ns) if end_ns <= span.start_ns), len(ends_ns))
            if free == len(ends_ns) < _MAX_ROWS:
                rows.append(len(self.rows))
                self.rows.append(name if not rows[1:] else f"{name} ({len(rows)})")
                ends_ns.append(0)
            free = min(free, len(rows) - 1)
            ends_ns[free] = max(ends_ns[free], span.end_ns)
            self._columns["start"].append(span.start_ns - self.zero_ns)
            self._columns["took"].append(span.duration_ns)
            self._columns["row"].append(rows[free])
            self._columns["name"].append(self._names.setdefault(span.name, len(self._names)))
            self._details.append([span.trace_id, span.span_id, span.attributes, span.error])


def packed(value: Any) -> str:
    """A value as JSON, packed, as text."""
    return base64.b64encode(gzip.compress(json.dumps(value, separators=(",", ":")).encode(), 5)).decode()


def _by_number(name: str) -> tuple[str, int]:
    word, _, number = name.partition(" ")
    return word, int(number) if number.isdecimal() else 0
