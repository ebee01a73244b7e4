"""Spans are made when there is nothing to read: reading comes first, and begins before the SDK has been imported."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, overload

from otel_npu import semconv
from otel_npu.relay.ledger import CROWDED_BYTES, LITTLE_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from opentelemetry.sdk.trace import ReadableSpan

    from otel_npu.drops import Drops
    from otel_npu.relay.account import Account
    from otel_npu.relay.export import ExportQueue

_log = logging.getLogger("otel_npu.relay")

MAX_TRACE_SPANS: Final = 65_536
"""So many spans of steps wait at most to be made. What their frames may take bounds them too, mostly before that."""
MAX_REQUESTS: Final = 16_384
"""And so many requests, which go first."""
_LOAD_SECONDS: Final = 60.0


class Unmade(Sequence["ReadableSpan"]):
    """Spans that are made when somebody looks at them, once.

    Args:
        make: Makes them.
        gives_way: About how many they are if they may be given up, where there is more to read than can be made: the
            trace of a step. Else 0.
        given_up: Called if they are never made: lets go of what they would have been made of.
    """

    __slots__ = ("_given_up", "_made", "_make", "gives_way")

    def __init__(
        self,
        make: Callable[[], Sequence[ReadableSpan]],
        *,
        gives_way: int = 0,
        given_up: Callable[[], None] | None = None,
    ) -> None:
        self._make: Callable[[], Sequence[ReadableSpan]] | None = make
        self._given_up = given_up
        self._made: Sequence[ReadableSpan] = ()
        self.gives_way = gives_way

    def __len__(self) -> int:
        return len(self._spans())

    def __iter__(self) -> Iterator[ReadableSpan]:
        return iter(self._spans())

    @overload
    def __getitem__(self, index: int) -> ReadableSpan: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[ReadableSpan]: ...
    def __getitem__(self, index: int | slice) -> ReadableSpan | Sequence[ReadableSpan]:
        return self._spans()[index]

    def give_up(self) -> None:
        """Nobody will look at them."""
        given_up = self._given_up
        self._make = self._given_up = None
        if given_up is not None:
            given_up()

    def _spans(self) -> Sequence[ReadableSpan]:
        make = self._make
        if make is not None:
            self._make = self._given_up = None
            self._made = make()
        return self._made


class _Turns:
    """What waits of each client, to be made by turns, the oldest of each first.

    Attributes:
        weight: How much that is, together.
    """

    def __init__(self) -> None:
        self.weight = 0
        self._waiting: dict[Account, deque[tuple[Sequence[ReadableSpan], int]]] = {}
        """Whose turn it is is the first."""
        self._weights: dict[Account, int] = {}

    def __contains__(self, account: object) -> bool:
        return account in self._waiting

    def __iter__(self) -> Iterator[Account]:
        return iter(self._waiting)

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def put(self, spans: Sequence[ReadableSpan], account: Account, weight: int) -> None:
        """Let these wait."""
        self._waiting.setdefault(account, deque()).append((spans, weight))
        self._weights[account] = self._weights.get(account, 0) + weight
        self.weight += weight

    def take(self, account: Account) -> tuple[Sequence[ReadableSpan], int]:
        """The oldest of this client, and its weight; the next is another's turn."""
        waiting = self._waiting.pop(account)
        spans, weight = waiting.popleft()
        self.weight -= weight
        self._weights[account] -= weight
        if waiting:
            self._waiting[account] = waiting
        else:
            del self._weights[account]
        return spans, weight

    def largest(self) -> Account:
        """The client of whom most waits."""
        return max(self._weights, key=self._weights.__getitem__)


class Making:
    """What is still to be made into spans, and the exporter behind it.

    Args:
        load: Makes the exporter's queue; it imports OpenTelemetry's SDK.
        drops: Where steps that are given up are counted.
    """

    def __init__(self, load: Callable[[], ExportQueue], drops: Drops) -> None:
        self._load = load
        self._drops = drops
        self._requests = _Turns()
        self._traces = _Turns()
        self._export: ExportQueue | None = None
        self._loading: threading.Thread | None = None
        self.told: Callable[[Sequence[ReadableSpan]], None] | None = None
        """Told of the spans of each request, while somebody looks."""

    def load(self) -> None:
        """Make the exporter now."""
        self._export = self._load()

    def load_beside(self) -> None:
        """Make the exporter on a thread of its own, while frames are read already."""
        try:
            self._loading = threading.Thread(target=self.load, name="otel-npu load", daemon=True)
            self._loading.start()
        except RuntimeError:  # no thread can be started: reading waits, then
            self._loading = None
            self.load()

    @property
    def export(self) -> ExportQueue | None:
        """The exporter's queue, once it is there."""
        return self._export

    @property
    def waiting(self) -> bool:
        """Whether there is anything that could be made now."""
        return self._export is not None and bool(self._requests or self._traces)

    def put(self, spans: Sequence[ReadableSpan], account: Account) -> None:
        """Take a client's spans. Those of one call leave together."""
        if isinstance(spans, Unmade) and spans.gives_way:
            self._traces.put(spans, account, spans.gives_way)
            while self._traces.weight > MAX_TRACE_SPANS:
                self._give_up(self._traces, self._traces.largest())
        elif isinstance(spans, Unmade) or spans:
            self._requests.put(spans, account, 1)
            if self._requests.weight > MAX_REQUESTS:
                self._give_up(self._requests, self._requests.largest())

    def give_way(self, asks: Account) -> bool:
        """Give up a trace that waits, so that there is room for what this client has sent; whether one did.

        The oldest of its own or, if it has none, of whoever makes the relay hold most, if that is more than it does
        itself: who sends much takes nothing from those who send little. Of less than much, more than little is enough:
        an engine has its requests and numbers before its workers have their traces.
        """
        if asks in self._traces:
            self._give_up(self._traces, asks)
            return True
        largest = max(self._traces, key=lambda account: account.held_bytes, default=asks)
        least = LITTLE_BYTES if asks.held_bytes < CROWDED_BYTES else asks.held_bytes
        if largest.held_bytes <= min(least, asks.held_bytes):
            return False
        self._give_up(self._traces, largest)
        return True

    def _give_up(self, turns: _Turns, account: Account) -> None:
        """Leave out the oldest of this client."""
        spans, weight = turns.take(account)
        if isinstance(spans, Unmade):
            spans.give_up()
        self._drops.add(semconv.RELAY_BUSY)
        account.lose(weight)

    def some(self, seconds: float) -> None:
        """Make what waits, for so much processor time; something of it in any case.

        Not for so long on the wall: where others have the processor that is over before anything is made.
        """
        if self._export is None:
            return
        until = time.thread_time() + seconds
        while self._requests or self._traces:
            self._next(self._export)
            if time.thread_time() >= until:
                return

    def all(self) -> ExportQueue:
        """Make all that waits; the exporter's queue, in which it is then."""
        if self._export is None and self._loading is not None:
            self._loading.join(_LOAD_SECONDS)
        if self._export is None:
            self.load()
        assert self._export is not None
        while self._requests or self._traces:
            self._next(self._export)
        return self._export

    def _next(self, export: ExportQueue) -> None:
        of_request = bool(self._requests)
        turns = self._requests if of_request else self._traces
        account = next(iter(turns))
        spans, _ = turns.take(account)
        try:
            export.put(list(spans), account)
            if of_request and self.told is not None:
                self.told(spans)
        except Exception:
            self._drops.add(semconv.INTERNAL_ERROR)
            account.lose()
            _log.exception("a fault of otel-npu's own; spans are lost")
