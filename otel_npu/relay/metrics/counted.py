"""What is counted: of each process its steps, of each engine its steps and requests, and of the relay itself."""

from __future__ import annotations

import logging
import os
import threading
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from otel_npu import semconv
from otel_npu.relay.metrics.books import Shelf
from otel_npu.relay.metrics.plans import ReaderError, exemplar_filter, plans_from_environment
from otel_npu.relay.metrics.readers import reader
from otel_npu.relay.metrics.series import Exemplar, Names

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from opentelemetry.sdk.metrics.export import MetricReader
    from opentelemetry.sdk.trace import ReadableSpan

    from otel_npu.drops import Drops
    from otel_npu.relay.metrics.books import Book
    from otel_npu.relay.metrics.plans import Plan
    from otel_npu.relay.metrics.source import Source
    from otel_npu.relay.placing import Ran
    from otel_npu.wire.frames import Hello, Scheduled, Stage, Step, Unfinished

_log = logging.getLogger("otel_npu.relay")

_MAX_SERVICES: Final = 16
_PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")

_StageKey: TypeAlias = tuple[Any, ...]


class Metrics:
    """All metrics of one relay. They are counted at once, and read once the SDK has been imported.

    Args:
        plans: What each reader is to get.
        drops: Those of the relay.
        exemplars: Which values may be exemplars, as `readers.exemplar_filter` says.
    """

    def __init__(self, plans: Sequence[Plan], drops: Drops, exemplars: str = "trace_based") -> None:
        self.exemplars = exemplars
        self._drops = drops
        names = Names(lambda: drops.add(semconv.TOO_MANY_NAMES))
        self._shelves = [Shelf(plan, names) for plan in plans]
        self._sources: list[Source] = []
        self._instance_id = str(uuid.uuid4())
        self._books: dict[tuple[str, ...], list[Book]] = {}
        self._told_drops: dict[str, int] = {}
        self._told_exported = 0
        self._told_cpu = 0.0
        self._lock = threading.Lock()
        self._queue: Callable[[], tuple[int, int, int]] = lambda: (0, 0, 0)

    @classmethod
    def from_environment(cls, drops: Drops, environment: Mapping[str, str] = os.environ) -> Metrics | None:
        """What the standard variables ask for; None where metrics are to go nowhere, or a variable has a bad value."""
        try:
            plans = plans_from_environment(environment)
        except ReaderError as error:
            _log.error("%s; no metrics are exported", error)
            return None
        return cls(plans, drops, exemplar_filter(environment)) if plans else None

    def load(self, queue: Callable[[], tuple[int, int, int]], environment: Mapping[str, str] = os.environ) -> None:
        """Begin to export. It imports the SDK.

        Args:
            queue: Says how many bytes of spans wait, how many may, and how many spans were exported.
            environment: The standard variables.
        """
        from otel_npu.relay.otlp_settings import ExportError

        self._queue = queue
        for shelf in list(self._shelves):
            try:
                self.read(shelf, reader(shelf.plan, environment))
            except (ReaderError, ExportError) as error:
                # What is wrong with a variable for all signals has been said of the spans.
                of_spans = isinstance(error, ExportError) and "_METRICS_" not in str(error)
                _log.log(logging.DEBUG if of_spans else logging.ERROR, "%s; no metrics are exported", error)
                self._forget(shelf)
            except Exception:
                _log.exception("the metrics' exporter could not be made; no metrics are exported")
                self._forget(shelf)

    def read(self, shelf: Shelf, by: MetricReader) -> None:
        """Have a reader read what was counted for it."""
        from otel_npu.relay.metrics.source import Source

        self._sources.append(Source(by, shelf, self._update))

    @property
    def shelves(self) -> Sequence[Shelf]:
        """What is counted, by reader."""
        return self._shelves

    def process(self, hello: Hello) -> Counted:
        """What counts for this process: with all of its service, told apart by rank and device."""
        # Not by what the hello says of a device: that is only known later, and must not make it another's.
        service: tuple[str, ...] = (
            hello.service_name,
            hello.resource_attributes,
            "" if hello.service_name else hello.executable,
        )
        with self._lock:
            if service not in self._books:
                if len(self._books) >= _MAX_SERVICES:
                    service = next(iter(self._books))
                else:
                    # Two servers of one name are two.
                    instance_id = f"{self._instance_id}-{len(self._books)}" if self._books else self._instance_id
                    self._books[service] = [shelf.book(hello, instance_id) for shelf in self._shelves]
            return Counted(self, self._books[service])

    def close(self, timeout_seconds: float) -> None:
        """Export a last time, as far as time allows."""
        deadline = time.monotonic() + timeout_seconds
        threads = [
            threading.Thread(target=source.reader.shutdown, args=(timeout_seconds * 1000,), daemon=True)
            for source in self._sources
        ]
        started = []
        for thread in threads:
            try:
                thread.start()
                started.append(thread)
            except RuntimeError:  # no thread can be started: one after the other, then
                thread.run()
        for thread in started:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _forget(self, shelf: Shelf) -> None:
        """Nobody reads it: count nothing for it any more."""
        with self._lock:
            self._shelves.remove(shelf)
            for books in self._books.values():
                books[:] = [book for book in books if book.lock is not shelf.lock]

    def _update(self) -> None:
        """Bring up to date what is not counted as it happens: under the service that came first."""
        with self._lock:
            books = next(iter(self._books.values()), None)
            if books is None:
                return
            drops, (waiting, limit, exported), cpu = self._drops.totals(), self._queue(), time.process_time()
            dropped = {reason: count - self._told_drops.get(reason, 0) for reason, count in drops.items()}
            newly_exported, used = exported - self._told_exported, cpu - self._told_cpu
            self._told_drops, self._told_exported, self._told_cpu = drops, exported, cpu
        for book in books:
            with book.lock:
                families = book.families
                for reason, count in dropped.items():
                    if count:
                        families[semconv.DROPS].add((reason,), count)
                families[semconv.QUEUE_SIZE].put((), waiting)
                families[semconv.QUEUE_LIMIT].put((), limit)
                families[semconv.SPANS_EXPORTED].add((), newly_exported)
                families[semconv.RELAY_CPU].add((), round(used * 1e9))
                families[semconv.RELAY_MEMORY].put((), _resident_bytes())


class Counted:
    """What is told of one process.

    Args:
        metrics: All of the relay's.
        books: Its service's.
    """

    def __init__(self, metrics: Metrics, books: list[Book]) -> None:
        self._always = metrics.exemplars == "always_on"
        self._never = metrics.exemplars == "always_off"
        self._books = books
        self._numbers: dict[int, int] = {}
        """The highest number of a step, by rank."""
        self._ends_ns: dict[int, int] = {}
        """Until when a device had a step, by its own clock."""

    def ran(self, ran: Ran) -> None:
        """A step has run."""
        step = ran.step
        process = _process(ran)
        captured = self._captured(step)
        common = _step_key(ran, process)
        (first_ns, last_ns), device, busy_ns = ran.extent, ran.device, 0
        if device is not None:
            busy_ns = max(0, last_ns - max(first_ns, self._ends_ns.get(device, first_ns)))
            self._ends_ns[device] = max(last_ns, self._ends_ns.get(device, last_ns))
        lag_ns = max(0, step.seen_ns - ran.end_ns)
        for book in self._books:
            with book.lock:
                families = book.families
                families[semconv.STEPS_RESOLVED].add(process, 1)
                families[semconv.STEPS_CAPTURED].add(process, captured)
                families[semconv.STEP_DURATION].record(common, last_ns - first_ns)
                if device is not None:
                    families[semconv.DEVICE_STEP_TIME].add((*process, device), busy_ns)
                    families[semconv.RESOLVER_LAG].record(process, lag_ns)
                    if ran.idle_ns is not None:
                        families[semconv.IDLE].record((step.kind, *process, device), ran.idle_ns)
                self._stages(book, ran, process, common[-1])
        if self._always:
            self._exemplify(ran, [None] * len(step.stages), None)

    def _captured(self, step: Step) -> int:
        """How many steps were begun since the last one that has come, this one included."""
        if step.rank >= 0 and not step.parent_span_id:  # beside the engine's numbers, such as a dummy step
            return 1
        last = self._numbers.get(step.rank, step.number - 1)
        self._numbers[step.rank] = max(last, step.number)
        return max(0, step.number - last)

    def kept(self, ran: Ran, spans: Sequence[ReadableSpan], reason: str) -> None:
        """A step has become a trace: these are its spans, its stages' first."""
        key = (reason, *_process(ran))
        for book in self._books:
            with book.lock:
                book.families[semconv.STEPS_KEPT].add(key, 1)
        if not self._never and len(spans) >= len(ran.step.stages):
            self._exemplify(ran, list(spans), spans[-1] if spans else None)

    def scheduled(self, frame: Scheduled) -> None:
        """An engine has scheduled a step, or says that requests have left it."""
        self.drops(frame.dropped)
        if not frame.total_tokens:
            return
        key = (frame.kind,)
        for book in self._books:
            with book.lock:
                book.families[semconv.ENGINE_STEP_TOKENS].record(key, frame.total_tokens)
                book.families[semconv.ENGINE_STEP_REQUESTS].record(key, frame.total_requests)

    def straggled(self, kind: str, skew_ns: int, ran: Ran) -> None:
        """In a step of this kind the others waited so long for this rank."""
        for book in self._books:
            with book.lock:
                book.families[semconv.SKEW].record((kind,), skew_ns)
                book.families[semconv.STRAGGLES].add(_process(ran), 1)

    def request(
        self, reason: str | None, device_ns: int, attributed_ns: int, spans: Sequence[ReadableSpan], unix_ns: int
    ) -> None:
        """A request is over for this reason: how long its steps took, its share of that, and its spans."""
        key = (reason,)
        span = spans[-1].context if spans else None
        exemplar = None
        if span is not None and not self._never:
            exemplar = Exemplar(device_ns, unix_ns, span.trace_id, span.span_id)
        for book in self._books:
            with book.lock:
                for metric, value in (
                    (semconv.REQUEST_TIME, device_ns),
                    (semconv.REQUEST_ATTRIBUTED_TIME, attributed_ns),
                ):
                    family = book.families[metric]
                    family.record(key, value)
                    if exemplar is not None:
                        family.exemplify(key, exemplar._replace(value=value))

    def hang(self, frame: Unfinished) -> None:
        """A stage hangs."""
        key = (frame.name, frame.step_kind, frame.rank if frame.rank >= 0 else None, frame.device_index)
        for book in self._books:
            with book.lock:
                book.families[semconv.HANGS].add(key, 1)

    def drops(self, counts: Mapping[str, int]) -> None:
        """The process has left out so much."""
        for book in self._books if counts else ():
            with book.lock:
                for reason, count in counts.items():
                    book.families[semconv.DROPS].add((reason,), count)

    def _stages(self, book: Book, ran: Ran, process: _StageKey, mode: Any) -> None:
        kind, rows = ran.step.kind, book.rows
        unsure: dict[int, int] = {}
        for stage, place in zip(ran.step.stages, ran.placed, strict=True):
            key = _stage_key(stage, kind, process, mode)
            duration, host_time, delay = rows.get(key) or _row(book, key)
            duration.add(stage.duration_ns)
            if stage.device_ns is not None:
                host_time.value += stage.exited_ns - stage.entered_ns
                delay.add(max(0, place.start_ns - stage.entered_ns))
                if place.uncertainty_ns is not None:
                    unsure[stage.device_index] = place.uncertainty_ns
        for device, uncertainty_ns in unsure.items():
            book.families[semconv.UNCERTAINTY].put((*process, device), uncertainty_ns)

    def _exemplify(self, ran: Ran, spans: Sequence[ReadableSpan | None], of_step: ReadableSpan | None) -> None:
        process = _process(ran)
        step, unix_ns = ran.step, ran.unix_ns
        common = _step_key(ran, process)
        first_ns, last_ns = ran.extent
        for book in self._books:
            with book.lock:
                families = book.families
                whole = _exemplar(last_ns - first_ns, ran.end_ns + unix_ns, of_step)
                families[semconv.STEP_DURATION].exemplify(common, whole)
                for stage, place, span in zip(step.stages, ran.placed, spans, strict=False):
                    key = _stage_key(stage, step.kind, process, common[-1])
                    at_ns = place.end_ns + unix_ns
                    families[semconv.STAGE_DURATION].exemplify(key, _exemplar(stage.duration_ns, at_ns, span))
                    if stage.device_ns is not None:
                        delay_ns = max(0, place.start_ns - stage.entered_ns)
                        families[semconv.STAGE_ENQUEUE_DELAY].exemplify(key[:5], _exemplar(delay_ns, at_ns, span))


def _row(book: Book, key: _StageKey) -> tuple[Any, ...]:
    """The series of a stage's times. Found at once the next time, unless they are those of the many."""
    families = book.families
    duration = families[semconv.STAGE_DURATION]
    on_device = key[5] == semconv.TIMING_DEVICE
    row = (
        duration.at(key),
        families[semconv.STAGE_HOST_TIME].at(key) if on_device else None,
        families[semconv.STAGE_ENQUEUE_DELAY].at(key[:5]) if on_device else None,
    )
    if key in duration.series:
        book.rows[key] = row
    return row


def _exemplar(value: int, unix_ns: int, span: ReadableSpan | None) -> Exemplar:
    context = span.context if span is not None else None
    return Exemplar(value, unix_ns, *((None, None) if context is None else (context.trace_id, context.span_id)))


def _process(ran: Ran) -> _StageKey:
    """Rank and data-parallel rank; neither where there are none."""
    step = ran.step
    dp_rank = step.attributes.get(semconv.DP_RANK) if step.attributes else None
    return step.rank if step.rank >= 0 else None, dp_rank if isinstance(dp_rank, int) else None


def _stage_key(stage: Stage, kind: str, process: _StageKey, mode: Any) -> _StageKey:
    timing = semconv.TIMING_HOST if stage.device_ns is None else semconv.TIMING_DEVICE
    return (stage.name, kind, *process, stage.device_index, timing, mode)


def _step_key(ran: Ran, process: _StageKey) -> _StageKey:
    step = ran.step
    mode = step.attributes.get(semconv.GRAPH_MODE) if step.attributes else None
    return (
        step.kind,
        *process,
        ran.device,
        semconv.TIMING_HOST if ran.device is None else semconv.TIMING_DEVICE,
        mode if isinstance(mode, str) else None,
    )


def _resident_bytes() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE_BYTES
    except (OSError, ValueError, IndexError):
        return 0
