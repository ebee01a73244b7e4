"""What leaves together: spans that are encoded once, for all exporters, and whose loss is counted once."""

from __future__ import annotations

import lzma
import zlib
from typing import TYPE_CHECKING, Final, NamedTuple

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from otel_npu import semconv
from otel_npu.drops import add_up
from otel_npu.relay.encoding import Request

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from opentelemetry.sdk.trace import ReadableSpan

    from otel_npu.relay.account import Account

_FAST: Final = 1  # what the next levels save is not worth their time
_LITTLE: Final = 3  # what zlib makes so many times smaller is small


_CARRIERS: Final = (semconv.WORKER_STEP, semconv.ENGINE_STEP)


def drop_counts(span: ReadableSpan) -> dict[str, int]:
    """The drop counts that a span carries, by reason: if it is lost, another has to."""
    prefix = semconv.DROPPED_PREFIX
    if not span.name.startswith(_CARRIERS):  # a rank's number may follow
        return {}
    attributes = span.attributes or {}
    return {
        key[len(prefix) :]: value
        for key, value in attributes.items()
        if key.startswith(prefix) and isinstance(value, int)
    }


class Batch:
    """Spans on their way to all exporters.

    Args:
        exporters: How many there are.
        made: When, in seconds.
        settled: Told once all exporters are done with it; `lost` says what became of it.
    """

    def __init__(self, exporters: int, made: float, settled: Callable[[Batch], None]) -> None:
        self.made = made
        self.count = 0
        self.lost: dict[str, int] = {}
        """By reason: of the exporter that lost most."""
        self.drop_counts: dict[str, int] = {}
        """Those that its spans carry."""
        self.accounts: dict[Account, int] = {}
        self.spans: list[ReadableSpan] = []
        self.request = Request()
        self._unsettled = exporters
        self._settled = settled

    def add(self, account: Account, spans: Sequence[ReadableSpan], encoded: Sequence[bytes], *, keep: bool) -> None:
        """Take in spans of one client.

        Args:
            account: The client.
            spans: Its spans.
            encoded: The same, encoded.
            keep: Whether there is an exporter that takes them as they are.
        """
        self.request.add(spans, encoded)
        for span in spans:
            if span._name.startswith(_CARRIERS):
                add_up(self.drop_counts, drop_counts(span))
        if keep:
            self.spans += spans
        self.count += len(spans)
        self.accounts[account] = self.accounts.get(account, 0) + len(spans)
        account.batches.setdefault(self, account.accepted)
        account.accepted += len(spans)

    def settle(self, lost: dict[str, int]) -> None:
        """One exporter is done with it."""
        if sum(lost.values()) > sum(self.lost.values()):
            self.lost = lost
        self._unsettled -= 1
        if not self._unsettled:
            self._settled(self)


class Delivery:
    """What one exporter has made of a batch so far."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        self._left = batch.count
        self._lost: dict[str, int] = {}

    def settle(self, count: int, lost: dict[str, int]) -> None:
        """So many of its spans are dealt with; some of them, by reason, lost."""
        self._left -= count
        for reason, number in lost.items():
            self._lost[reason] = self._lost.get(reason, 0) + number
        if not self._left:
            self._batch.settle(self._lost)


class Packing(NamedTuple):
    """A request made small, and what makes it whole again."""

    content: bytes
    unpack: Callable[[bytes], bytes]


class Load:
    """A batch, or a part of one, that waits for one exporter or is under way to it.

    Args:
        delivery: What it is a part of.
        made: When its batch was made, in seconds.
        count: How many spans.
        body: The request, encoded.
        spans: The spans themselves, where the exporter takes those.
    """

    def __init__(
        self, delivery: Delivery, made: float, count: int, body: bytes, spans: Sequence[ReadableSpan] = ()
    ) -> None:
        self.delivery = delivery
        self.made = made
        self.count = count
        self.spans = spans
        self.tries = 0
        self._content = body
        self._unpack: Callable[[bytes], bytes] | None = None

    @property
    def size(self) -> int:
        """How many bytes it holds."""
        return len(self._content)

    @property
    def packed(self) -> bool:
        """Whether it has been made small."""
        return self._unpack is not None

    @property
    def body(self) -> bytes:
        """The request, encoded."""
        return self._content if self._unpack is None else self._unpack(self._content)

    def packing(self) -> Packing:
        """Its packed form; the interpreter is free for others meanwhile."""
        packed = zlib.compress(self._content, _FAST)
        if len(packed) * _LITTLE < len(self._content):
            return Packing(packed, zlib.decompress)
        # The same thousand links on every step: zlib looks back 32 kB, which is less than one such step.
        return Packing(lzma.compress(self._content, preset=0), lzma.decompress)

    def pack(self, packing: Packing) -> None:
        """Hold its packed form: it has to wait."""
        self._content, self._unpack = packing.content, packing.unpack

    def again(self) -> Load:
        """The same once more, for another try while this one is still under way."""
        again = Load(self.delivery, self.made, self.count, self._content, self.spans)
        again.tries, again._unpack = self.tries, self._unpack
        return again

    def halves(self) -> list[Load]:
        """The same spans, in two requests."""
        halves = [ExportTraceServiceRequest.FromString(self.body) for _ in range(2)]
        for index, half in enumerate(halves):
            place = 0
            for resource_spans in half.resource_spans:
                for scope_spans in resource_spans.scope_spans:
                    spans = list(scope_spans.spans)
                    del scope_spans.spans[:]
                    kept = [span for at, span in enumerate(spans, place) if (at >= self.count // 2) == bool(index)]
                    scope_spans.spans.extend(kept)
                    place += len(spans)
        counts = self.count // 2, self.count - self.count // 2
        return [
            Load(self.delivery, self.made, count, half.SerializeToString())
            for count, half in zip(counts, halves, strict=True)
        ]
