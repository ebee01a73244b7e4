"""The way out: spans are encoded as they come, leave in batches, and wait in bounded memory while they can't."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from typing import TYPE_CHECKING, Final

from opentelemetry.sdk.trace.export import SpanExportResult

from otel_npu import semconv
from otel_npu.relay.batches import Batch, drop_counts
from otel_npu.relay.destination import Bounds, Destination
from otel_npu.relay.encoding import encode_span
from otel_npu.relay.otlp import OtlpExporter
from otel_npu.relay.outcomes import Never, Outcome, Taken
from otel_npu.secrets import masked
from otel_npu.settings import QUEUE_BYTES, Settings, SettingsError
from otel_npu.standard import bad_value

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.trace.export import SpanExporter

    from otel_npu.drops import Drops
    from otel_npu.relay.account import Account
    from otel_npu.relay.batches import Load

_log = logging.getLogger("otel_npu.relay")

_MAX_BATCH_BYTES: Final = 1 << 20
"""Receivers take 4 MB at once over gRPC, unless they are told otherwise; proxies before them often 1 MB."""
_LEAST_BATCH_BYTES: Final = 1 << 16
_LOOK_SECONDS: Final = 1.0


class ExportQueue:
    """Takes spans, and exports them in batches to each exporter on its own.

    A client's spans that are put together leave together: a trace that trickles in is cut in pieces by its store.

    Args:
        exporters: Each gets every span.
        drops: Where spans that could not be kept or exported are counted.
        environment: Read for the standard `OTEL_BSP_*` variables and for the bound in bytes.
    """

    def __init__(
        self, exporters: Sequence[SpanExporter], drops: Drops, environment: Mapping[str, str] = os.environ
    ) -> None:
        self._drops = drops
        # Shorter than the standard 5 s, for the same reason.
        self._delay = _number(environment, "OTEL_BSP_SCHEDULE_DELAY", 1000) / 1000
        most_spans = _number(environment, "OTEL_BSP_MAX_QUEUE_SIZE", sys.maxsize)
        self._max_batch = min(_number(environment, "OTEL_BSP_MAX_EXPORT_BATCH_SIZE", 512), most_spans)
        self._most_bytes = _queue_bytes(environment)
        self._exported = 0
        bounds = Bounds(self._most_bytes // max(1, len(exporters)), most_spans)
        self._destinations = [Destination(exporter, bounds) for exporter in exporters]
        self._keep = any(destination.takes_spans for destination in self._destinations)
        self._changed = threading.Condition()
        self._open = self._new_batch()
        self._closed = False
        self._senders: dict[Destination, int] = dict.fromkeys(self._destinations, 0)
        self._runs = not self._destinations
        self._start()

    def put(self, spans: Sequence[ReadableSpan], account: Account) -> None:
        """Encode a client's spans and queue them; the oldest batches are dropped when there is too much."""
        if not self._destinations or not spans:
            return
        self._start()
        encoded = []
        try:
            encoded = [encode_span(span) for span in spans]
        except Exception:  # one of them is bad, and is left out
            spans, encoded = self._encode_one_by_one(spans, account)
        size = sum(map(len, encoded))
        with self._changed:
            batch, most = self._open, self._max_batch_bytes()
            if batch.count and (batch.count + len(spans) > self._max_batch or batch.request.size + size > most):
                self._seal()
            if not self._open.count:
                self._open.made = time.monotonic()
                self._changed.notify_all()  # it has to leave by the clock
            self._open.add(account, spans, encoded, keep=self._keep)
            if self._open.count >= self._max_batch or self._open.request.size >= most:
                self._seal()

    def outcome(self, account: Account, accepted: int) -> bool | None:
        """Whether a client's first so many spans were exported, nothing lost since it last asked; None: not yet.

        Never waits: others must be served meanwhile.
        """
        with self._changed:
            if account.handled < accepted:
                self._hurry(account)
                return None
            lost, account.lost = account.lost, 0
            return not lost

    def fill(self) -> tuple[int, int, int]:
        """How many bytes of spans wait, how many may, and how many spans were exported."""
        with self._changed:
            waiting = self._open.request.size + sum(destination.size for destination in self._destinations)
        return waiting, self._most_bytes, self._exported

    def flush(self, account: Account, accepted: int, timeout_seconds: float) -> bool:
        """Export a client's first so many spans; whether that was in time and nothing lost since its last flush."""
        with self._changed:
            self._hurry(account)
            in_time = self._changed.wait_for(lambda: account.handled >= accepted, timeout_seconds)
            lost, account.lost = account.lost, 0
            return in_time and not lost

    def wait(self, timeout_seconds: float) -> int:
        """Export what is queued, for so long at most; how many spans are still to be dealt with, by all exporters."""
        with self._changed:
            self._hurry(None)
            self._changed.wait_for(lambda: not any(one.left for one in self._destinations), timeout_seconds)
            for destination in self._destinations:
                destination.tell()
            return sum(destination.left for destination in self._destinations)

    def close(self, timeout_seconds: float) -> None:
        """Export what is queued, as far as time allows; what is left then is counted."""
        deadline = time.monotonic() + timeout_seconds
        with self._changed:
            self._seal()
            for destination in self._destinations:
                destination.end_by(deadline)
            self._changed.notify_all()
            self._changed.wait_for(lambda: all(one.over for one in self._destinations), timeout_seconds)
            stuck = [destination for destination in self._destinations if not destination.over]
            for destination in self._destinations:
                destination.give_up()
            self._closed = True
            self._changed.notify_all()
        for destination in self._destinations:
            if destination not in stuck:  # else it is in its receiver; the process ends around it
                closing = _start_thread("otel-npu close", destination.exporter.shutdown)  # that can take minutes
                if closing is not None:
                    closing.join(max(0.1, deadline - time.monotonic()))

    # In.

    def _encode_one_by_one(
        self, spans: Sequence[ReadableSpan], account: Account
    ) -> tuple[list[ReadableSpan], list[bytes]]:
        good, encoded = [], []
        for span in spans:
            try:
                encoded.append(encode_span(span))
            except Exception as error:
                self._drops.add(semconv.NOT_ENCODABLE)
                self._drops.put_back(drop_counts(span))
                account.lose()
                _log.debug("a span %r can't be encoded: %s", span.name, error)
            else:
                good.append(span)
        return good, encoded

    def _new_batch(self) -> Batch:
        return Batch(len(self._destinations), time.monotonic(), self._settled)

    def _max_batch_bytes(self) -> int:
        most = min(
            (one.most_bytes for one in self._destinations if one.most_bytes is not None), default=_MAX_BATCH_BYTES
        )
        return max(_LEAST_BATCH_BYTES, min(most, _MAX_BATCH_BYTES))

    def _hurry(self, account: Account | None) -> None:
        """Somebody waits, for the spans of one client or for all."""
        if account is None or self._open in account.batches:
            self._seal()
        for destination in self._destinations:
            destination.hurry()
        self._changed.notify_all()

    def _seal(self) -> None:
        """The batch that was filled leaves."""
        batch, self._open = self._open, self._new_batch()
        if not batch.count:
            return
        body = batch.request.encode()
        batch.request.clear()
        for destination in self._destinations:
            destination.offer(batch, body)
        self._changed.notify_all()

    def _settled(self, batch: Batch) -> None:
        """All exporters are done with this batch."""
        lost = sum(batch.lost.values())
        self._exported += max(0, batch.count - lost)
        for reason, count in batch.lost.items():
            self._drops.add(reason, count)
        if lost >= batch.count:
            self._drops.put_back(batch.drop_counts)
        for account, count in batch.accounts.items():
            del account.batches[batch]
            account.lose(min(count, lost))
        self._changed.notify_all()

    # Out.

    def _start(self) -> None:
        """Have a thread that sees to all this."""
        if not self._runs:
            self._runs = _start_thread("otel-npu export", self._run) is not None

    def _run(self) -> None:
        while not self._closed:
            try:
                self._tend()
            except Exception:
                self._own_fault()

    def _tend(self) -> None:
        """Send what is due by the clock, make small what has to wait, and see to it that somebody sends."""
        with self._changed:
            if self._open.count and time.monotonic() - self._open.made >= self._delay:
                self._seal()
            for destination in self._destinations:
                self._senders[destination] -= destination.leave_overdue()
                self._man(destination)
                destination.tick()
            loads = [(one, load) for one in self._destinations for load in one.unpacked()]
            if not loads and not self._closed:
                self._changed.wait(self._until_next())
        for destination, load in loads:
            packing = load.packing()
            with self._changed:
                destination.pack(load, packing)

    def _until_next(self) -> float:
        """Seconds until something is due by the clock."""
        due = [_LOOK_SECONDS]
        if self._open.count:
            due.append(self._open.made + self._delay - time.monotonic())
        due += [one.pause() for one in self._destinations if self._senders[one] <= len(one.under_way)]
        return max(0.001, min(due))

    def _man(self, destination: Destination) -> None:
        """Have a thread that sends the next one."""
        busy = self._senders[destination] <= len(destination.under_way)
        if busy and destination.pause() <= 0:
            self._senders[destination] += bool(_start_thread("otel-npu send", lambda: self._serve(destination)))

    def _serve(self, destination: Destination) -> None:
        while True:
            with self._changed:
                while (load := destination.take()) is None:
                    if self._closed:
                        return
                    self._changed.wait(min(_LOOK_SECONDS, destination.pause()))
            outcome = _send(destination, load)
            with self._changed:
                try:
                    if not destination.done(load, outcome):
                        return  # it took too long: another thread is in this one's place
                except Exception:
                    self._own_fault()
                self._changed.notify_all()

    def _own_fault(self) -> None:
        self._drops.add(semconv.INTERNAL_ERROR)
        _log.exception("a fault of otel-npu's own; spans are lost")
        time.sleep(_LOOK_SECONDS)  # it may well come again


def _start_thread(name: str, work: Callable[[], None]) -> threading.Thread | None:
    thread = threading.Thread(target=work, name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError as error:  # there are no threads left; there may be
        _log.debug("can't start a thread now: %s", error)
        return None
    return thread


def _send(destination: Destination, load: Load) -> Outcome:
    exporter = destination.exporter
    try:
        if isinstance(exporter, OtlpExporter):
            return exporter.send(load.body, exporter.settings.timeout_seconds)
        taken = exporter.export(load.spans) is SpanExportResult.SUCCESS
    except Exception as error:
        return Never(masked(f"{type(error).__name__}: {error}"), semconv.EXPORT_FAILED)
    return Taken() if taken else Never(reason=semconv.EXPORT_FAILED)


def _number(environment: Mapping[str, str], variable: str, default: int) -> int:
    value = environment.get(variable, "").strip()
    bad = bad_value(variable, value) if value else None
    if bad is not None:
        _log.error("%s; the default is used", bad)
    return int(value) if value and bad is None else default


def _queue_bytes(environment: Mapping[str, str]) -> int:
    try:
        return Settings.from_environment({QUEUE_BYTES: environment.get(QUEUE_BYTES, "")}).queue_bytes
    except SettingsError as error:
        _log.error("%s; the default is used", error)
        return Settings.queue_bytes
