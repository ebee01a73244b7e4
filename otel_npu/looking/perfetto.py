"""Spans as Chrome trace events, for ui.perfetto.dev: a track for each rank and stream, flows, and counters.

The format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

from __future__ import annotations

import gzip
import itertools
import json
from typing import TYPE_CHECKING, Any, Final

from otel_npu import semconv
from otel_npu.looking.model import Model

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from otel_npu.looking.model import Run, Step
    from otel_npu.looking.span import Span

_REQUESTS: Final = "requests"
_ENGINE: Final = "engine steps"


def write(spans: Sequence[Span]) -> bytes:
    """The file, packed."""
    document = {"traceEvents": events(spans), "displayTimeUnit": "ms"}
    return gzip.compress(json.dumps(document, separators=(",", ":")).encode(), 6)


def events(spans: Sequence[Span]) -> list[dict[str, Any]]:
    """All events; times are microseconds since the first span began."""
    model = Model(spans)
    return _Events(model).made if model.spans else []


class _Events:
    def __init__(self, model: Model) -> None:
        self._model = model
        self._zero_ns = model.spans[0].start_ns
        self._processes: dict[str, int] = {}
        self._threads: dict[tuple[int, str], int] = {}
        self._flows = itertools.count(1)
        self._places: dict[int, tuple[int, int]] = {}
        """Where a span lies, by its identity: its process and thread."""
        self.made: list[dict[str, Any]] = []
        self._slices()
        for step in model.steps:
            self._flow(step)
        self._counters()

    def _slices(self) -> None:
        tracks: dict[tuple[int, str], list[Span]] = {}
        for step in self._model.steps:
            if step.engine is not None:
                tracks.setdefault(self._track(step.engine, _ENGINE), []).append(step.engine)
            for run in step.runs:
                for span, name in _named(run):
                    tracks.setdefault(self._track(span, name), []).append(span)
        for request in self._model.requests:
            for span in request.spans:
                tracks.setdefault(self._track(request.spans[0], _REQUESTS), []).append(span)
        for (process, name), spans in tracks.items():
            for number, lane in enumerate(lanes(spans)):
                thread = self._thread(process, f"{name} ({number + 1})" if number else name)
                for span in lane:
                    self._slice(span, process, thread)

    def _slice(self, span: Span, process: int, thread: int) -> None:
        self._places[id(span)] = process, thread
        arguments = {key: value for key, value in span.attributes.items() if value is not None}
        if span.error:
            arguments["error"] = span.error
        self.made.append(
            {
                "ph": "X",
                "name": span.name,
                "cat": "span",
                "ts": self._us(span.start_ns),
                "dur": span.duration_ns / 1000,
                "pid": process,
                "tid": thread,
                "args": {**arguments, "trace_id": span.trace_id, "span_id": span.span_id},
            }
        )

    def _flow(self, step: Step) -> None:
        """An arrow from the engine's step to each rank's part of it."""
        if step.engine is None:
            return
        for run in step.runs:
            number = next(self._flows)
            for phase, span in (("s", step.engine), ("f", run.span)):
                process, thread = self._places[id(span)]
                self.made.append(
                    {
                        "ph": phase,
                        "name": "ranks",
                        "cat": "step",
                        "id": number,
                        "ts": self._us(span.start_ns),
                        "pid": process,
                        "tid": thread,
                        **({"bp": "e"} if phase == "f" else {}),
                    }
                )

    def _counters(self) -> None:
        for step in self._model.steps:
            if step.engine is not None:
                for name, key in (("tokens", semconv.STEP_TOKENS), ("requests", semconv.STEP_REQUESTS)):
                    self._count(step.engine, name, step.engine.start_ns, step.engine.attributes.get(key))
            for run in step.runs:
                idle = run.span.attributes.get(semconv.STEP_IDLE)
                name = "idle ms" if run.rank is None else f"idle ms, rank {run.rank}"
                self._count(run.span, name, run.span.start_ns, None if idle is None else idle * 1000)
        waiting = 0
        for at_ns, change, span in sorted(self._queues(), key=lambda entry: entry[:2]):
            waiting += change
            self._count(span, "requests waiting", at_ns, waiting)

    def _queues(self) -> Iterable[tuple[int, int, Span]]:
        for request in self._model.requests:
            queue = request.phase(semconv.QUEUE)
            if queue is not None:
                yield queue.start_ns, 1, queue
                yield queue.end_ns, -1, queue

    def _count(self, span: Span, name: str, at_ns: int, value: float | None) -> None:
        if value is not None:
            counted = {name: value}
            self.made.append(
                {"ph": "C", "name": name, "ts": self._us(at_ns), "pid": self._process(span), "args": counted}
            )

    def _us(self, at_ns: int) -> float:
        return (at_ns - self._zero_ns) / 1000

    def _track(self, span: Span, name: str) -> tuple[int, str]:
        return self._process(span), name

    def _process(self, span: Span) -> int:
        key = str(span.resource.get(semconv.SERVICE_INSTANCE_ID, id(span.resource)))
        number = self._processes.get(key)
        if number is None:
            number = self._processes[key] = len(self._processes) + 1
            service = span.resource.get(semconv.SERVICE_NAME, "process")
            name = f"{service} {span.resource.get(semconv.PROCESS_PID, '')}".strip()
            self.made.append({"ph": "M", "name": "process_name", "pid": number, "tid": 0, "args": {"name": name}})
        return number

    def _thread(self, process: int, name: str) -> int:
        number = self._threads.get((process, name))
        if number is None:
            number = self._threads[process, name] = len(self._threads) + 1
            for what, value in (("thread_name", {"name": name}), ("thread_sort_index", {"sort_index": number})):
                self.made.append({"ph": "M", "name": what, "pid": process, "tid": number, "args": value})
        return number


def _named(run: Run) -> Iterable[tuple[Span, str]]:
    """The spans of a rank's part of a step, each with the name of its track."""
    rank = "" if run.rank is None else f"rank {run.rank} "
    if run.span not in run.stages:
        yield run.span, f"{rank}steps"
    for stage in run.stages:
        stream = stage.attributes.get(semconv.STREAM_ID)
        device = stage.attributes.get(semconv.DEVICE_INDEX)
        yield stage, f"{rank}host" if stream is None else f"{rank}device {device} stream {stream}"


def lanes(spans: Sequence[Span]) -> list[list[Span]]:
    """The spans in as few rows as have each of them beside, or inside, each other of its row."""
    rows: list[tuple[list[Span], list[int]]] = []
    for span in sorted(spans, key=lambda span: (span.start_ns, -span.end_ns)):
        row, ends_ns = next((row for row in rows if _fits(span, row[1])), ([], []))
        if not row:
            rows.append((row, ends_ns))
        row.append(span)
        ends_ns.append(span.end_ns)
    return [row for row, _ in rows]


def _fits(span: Span, ends_ns: list[int]) -> bool:
    """Whether it is beside or inside those that end then, each inside the one before it; which of them are over."""
    while ends_ns and ends_ns[-1] <= span.start_ns:
        ends_ns.pop()
    return not ends_ns or span.end_ns <= ends_ns[-1]
