"""Spans out: the standard exporters, behind a bounded queue and a thread, with every loss counted."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Final

from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from otel_npu import semconv

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from opentelemetry.sdk.trace import ReadableSpan

    from otel_npu.drops import Drops

_log = logging.getLogger("otel_npu.relay")

_GROUP: Final = "opentelemetry_traces_exporter"
_PROTOCOLS: Final = {"grpc": "otlp_proto_grpc", "http/protobuf": "otlp_proto_http"}


class ExportError(ValueError):
    """A standard variable that says where spans go holds what it does not take, or names what isn't installed."""


def exporters_from_environment(environment: Mapping[str, str] = os.environ) -> list[SpanExporter]:
    """The exporters that `OTEL_TRACES_EXPORTER` names: `otlp` unless it says otherwise, none for `none`.

    Raises:
        ExportError: It names an exporter or a protocol that is not there.
    """
    names = environment.get("OTEL_TRACES_EXPORTER", "").strip() or "otlp"
    exporters = []
    for name in filter(None, (name.strip() for name in names.split(","))):
        if name == "none":
            continue
        entry = _PROTOCOLS[_protocol(environment)] if name == "otlp" else name
        found = next(iter(entry_points(group=_GROUP, name=entry)), None)
        if found is None:
            installed = sorted({point.name for point in entry_points(group=_GROUP)} | {"none"})
            raise ExportError(f"OTEL_TRACES_EXPORTER={names!r}: takes {', '.join(installed)}; not {name!r}")
        exporters.append(found.load()(**(_otlp_arguments(entry, environment) if name == "otlp" else {})))
    return exporters


def _otlp_arguments(entry: str, environment: Mapping[str, str]) -> dict[str, Any]:
    """What an OTLP exporter would read from the process's environment, which this one need not be."""
    arguments: dict[str, Any] = {}
    endpoint = environment.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "").strip()
    if endpoint:
        arguments["endpoint"] = endpoint
    insecure = environment.get("OTEL_EXPORTER_OTLP_TRACES_INSECURE", "").strip().lower()
    if insecure and entry == _PROTOCOLS["grpc"]:
        arguments["insecure"] = insecure == "true"
    return arguments


def _protocol(environment: Mapping[str, str]) -> str:
    for variable in ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        protocol = environment.get(variable, "").strip()
        if protocol:
            if protocol not in _PROTOCOLS:
                raise ExportError(f"{variable}={protocol!r}: takes {' or '.join(_PROTOCOLS)}")
            return protocol
    return "grpc"


class Nowhere(SpanExporter):
    """In the place of an exporter that could not be made: what it gets is lost, and counted."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:  # noqa: ARG002  they go nowhere
        """Fail."""
        return SpanExportResult.FAILURE


class Account:
    """What one client's frames have become: how many spans, how many of them are dealt with, how many of those lost."""

    def __init__(self) -> None:
        self.accepted = self.handled = self.lost = 0


class ExportQueue:
    """A bounded queue of spans and the thread that exports them in batches.

    The SDK's own batch processor counts no losses and its `force_flush` has no time limit.

    Args:
        exporters: Each gets every span.
        drops: Where spans that could not be kept or exported are counted.
        environment: Read for the standard `OTEL_BSP_*` variables.
    """

    def __init__(
        self, exporters: Sequence[SpanExporter], drops: Drops, environment: Mapping[str, str] = os.environ
    ) -> None:
        self._exporters = exporters
        self._drops = drops
        # Shorter than the standard 5 s: a trace that trickles in is cut in pieces by its store.
        self._delay = _number(environment, "OTEL_BSP_SCHEDULE_DELAY", 1000) / 1000
        self._max_queue = _number(environment, "OTEL_BSP_MAX_QUEUE_SIZE", 16384)
        self._max_batch = _number(environment, "OTEL_BSP_MAX_EXPORT_BATCH_SIZE", 512)
        self._queue: deque[tuple[Account, ReadableSpan]] = deque()
        self._changed = threading.Condition()
        self._in_flight = 0
        self._wanted = False
        self._thread = threading.Thread(target=self._run, name="otel-npu export", daemon=True)
        self._thread.start()

    def put(self, spans: Sequence[ReadableSpan], account: Account) -> None:
        """Queue a client's spans; the oldest of all are dropped when there are too many."""
        if not self._exporters or not spans:
            return
        with self._changed:
            self._queue.extend((account, span) for span in spans)
            account.accepted += len(spans)
            over = len(self._queue) - self._max_queue
            if over > 0:
                self._settle([self._queue.popleft() for _ in range(over)], semconv.QUEUE_FULL)
                self._changed.notify_all()
            elif len(self._queue) >= self._max_batch:
                self._changed.notify_all()

    def flush(self, account: Account, accepted: int, timeout_seconds: float) -> bool:
        """Export a client's first so many spans; whether that was in time and none was lost since its last flush."""
        with self._changed:
            self._wanted = True
            self._changed.notify_all()
            in_time = self._changed.wait_for(lambda: account.handled >= accepted, timeout_seconds)
            lost, account.lost = account.lost, 0
            return in_time and not lost

    def close(self, timeout_seconds: float) -> None:
        """Export what is queued, as far as time allows; what is left then is counted."""
        deadline = time.monotonic() + timeout_seconds
        with self._changed:
            self._wanted = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._queue and not self._in_flight, timeout_seconds)
            left = len(self._queue) + self._in_flight
            self._queue.clear()
        if left:
            self._drops.add(semconv.EXPORT_FAILED, left)
            return  # an exporter is stuck in its receiver; the process ends around it
        for exporter in self._exporters:
            closing = threading.Thread(target=exporter.shutdown, daemon=True)  # its own timeout can be minutes
            closing.start()
            closing.join(max(0.1, deadline - time.monotonic()))

    def _run(self) -> None:
        while True:
            with self._changed:
                if len(self._queue) < self._max_batch and not (self._wanted and self._queue):
                    self._wanted = False
                    self._changed.wait(self._delay)
                batch = [self._queue.popleft() for _ in range(min(self._max_batch, len(self._queue)))]
                self._in_flight = len(batch)
            if not batch:
                continue
            spans = [span for _, span in batch]
            failed = sum(not _export(exporter, spans) for exporter in self._exporters)
            with self._changed:
                self._in_flight = 0
                self._settle(batch, semconv.EXPORT_FAILED if failed else None)
                self._changed.notify_all()

    def _settle(self, items: Sequence[tuple[Account, ReadableSpan]], lost: str | None) -> None:
        """These spans are dealt with: exported or, for a reason, lost."""
        for account, _ in items:
            account.handled += 1
            account.lost += lost is not None
        if lost is not None:
            self._drops.add(lost, len(items))
            for _, span in items:
                _put_back_counts(span, self._drops)


def _put_back_counts(span: ReadableSpan, drops: Drops) -> None:
    """The drop counts on a step span that was lost itself go with a later one."""
    prefix = semconv.DROPPED_PREFIX
    counts = {key[len(prefix) :]: value for key, value in (span.attributes or {}).items() if key.startswith(prefix)}
    drops.put_back({reason: value for reason, value in counts.items() if isinstance(value, int)})


def _export(exporter: SpanExporter, batch: list[ReadableSpan]) -> bool:
    try:
        return exporter.export(batch) is SpanExportResult.SUCCESS
    except Exception as error:
        _log.warning("%s failed: %s", type(exporter).__name__, error)
        return False


def _number(environment: Mapping[str, str], variable: str, default: int) -> int:
    value = environment.get(variable, "").strip()
    try:
        number = int(value or default)
    except ValueError:
        number = 0
    if number <= 0:
        _log.error("%s=%r: takes a whole number above 0; using %d", variable, value, default)
        return default
    return number
