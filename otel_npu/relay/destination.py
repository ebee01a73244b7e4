"""One exporter's share of the way out: what waits for it, what is under way to it, and when to try again.

It starts no thread and takes no lock: whoever calls it holds one. So its time can be a fake clock's.
"""

from __future__ import annotations

import random
import time
from collections import deque
from typing import TYPE_CHECKING, Final, NamedTuple

from otel_npu import semconv
from otel_npu.relay.availability import Availability
from otel_npu.relay.batches import Delivery, Load
from otel_npu.relay.otlp import OtlpExporter
from otel_npu.relay.outcomes import Later, Never, Outcome, Taken, TooLarge

if TYPE_CHECKING:
    from collections.abc import Callable

    from opentelemetry.sdk.trace.export import SpanExporter

    from otel_npu.relay.batches import Batch, Packing

GIVE_UP_SECONDS: Final = 300.0
"""For how long a batch is tried."""
FIRST_WAIT_SECONDS: Final = 0.5
LONGEST_WAIT_SECONDS: Final = 5.0
_GROWTH: Final = 1.5
_JITTER: Final = 0.2
MOST_AT_ONCE: Final = 4
SLOW_SECONDS: Final = 0.1
"""An export that takes longer is joined by another."""
_GRACE_SECONDS: Final = 1.0
_MOST_STUCK: Final = 8
_HURRY_SECONDS: Final = 1.0
_OBJECTS: Final = 8  # about how many times as large as their encoding spans are as objects


class Bounds(NamedTuple):
    """How much may wait: so many bytes, and so many spans."""

    size: int
    spans: int


class Destination:
    """What is on its way to one exporter.

    Args:
        exporter: The exporter.
        bounds: What it may hold.
        now: Seconds that go on by themselves.
        jitter: A random number between two.
    """

    def __init__(
        self,
        exporter: SpanExporter,
        bounds: Bounds,
        now: Callable[[], float] = time.monotonic,
        jitter: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self.exporter = exporter
        self.takes_spans = not isinstance(exporter, OtlpExporter)
        self.waiting: deque[Load] = deque()
        self.under_way: dict[Load, float] = {}
        self.most_bytes: int | None = None
        """The most that the receiver takes at once, as far as it has refused more."""
        self._at_once = 1 if self.takes_spans else MOST_AT_ONCE
        self._weight = _OBJECTS if self.takes_spans else 1
        self._bounds = bounds
        self._now = now
        self._jitter = jitter
        self._wait_seconds = 0.0
        self._failed_at = self._resume_at = 0.0
        self._demanded = False
        self._stuck = 0
        self._end: float | None = None
        self._size = self._spans = 0
        name = exporter.settings.shown if isinstance(exporter, OtlpExporter) else type(exporter).__name__
        promise = f"they wait here, for {GIVE_UP_SECONDS / 60:.0f} minutes and in {bounds.size / 1e6:.0f} MB at most"
        self._availability = Availability(name, promise)

    # In.

    def offer(self, batch: Batch, body: bytes) -> None:
        """A batch is to leave; the oldest are dropped when there are too many."""
        self._keep(Load(Delivery(batch), batch.made, batch.count, body, batch.spans if self.takes_spans else ()))
        self._bound()

    def unpacked(self) -> list[Load]:
        """What has to wait and could be smaller."""
        if self.takes_spans or not (self._availability.away or len(self.waiting) > 1):
            return []
        return [load for load in self.waiting if not load.packed]

    def pack(self, load: Load, packing: Packing) -> None:
        """Take in the packed form of what waits, if it still does."""
        if load in self.waiting:  # else it is being read
            self._size += len(packing.content) - load.size
            load.pack(packing)

    # Out.

    def take(self) -> Load | None:
        """What is to be sent now; it is under way from then on."""
        if self.pause() > 0:
            return None
        # One that has failed comes after the others: it may be the reason.
        load = min(self.waiting, key=_tries)
        self._forget(load)
        self.under_way[load] = self._now()
        return load

    def pause(self) -> float:
        """For how many seconds nothing is to be sent, unless something happens."""
        if not self.waiting or self._stuck >= _MOST_STUCK or len(self.under_way) >= self._at_once:
            return float("inf")
        now = self._now()
        if self._resume_at > now:
            return self._resume_at - now
        if self.under_way:
            if self._availability.away:  # one try is enough
                return float("inf")
            return max(self.under_way.values()) + SLOW_SECONDS - now
        return 0.0

    def done(self, load: Load, outcome: Outcome) -> bool:
        """What has become of it; False if it had been left before, so that this is of no consequence."""
        if self.under_way.pop(load, None) is None:
            self._stuck -= 1
            return False
        now = self._now()
        if isinstance(outcome, Later):
            self._later(load, outcome, now)
            return True
        self._availability.reached(now)
        self._wait_seconds, self._resume_at, self._demanded = 0.0, 0.0, False
        if isinstance(outcome, Taken):
            lost = {semconv.EXPORT_REJECTED: min(outcome.rejected, load.count)} if outcome.rejected else {}
            if lost:
                self._availability.refused(lost[semconv.EXPORT_REJECTED], outcome.message or "no reason given", now)
            load.delivery.settle(load.count, lost)
        elif isinstance(outcome, TooLarge) and load.count > 1:
            self.most_bytes = len(load.body) // 2
            for half in reversed(load.halves()):
                self._keep(half, first=True)
        else:
            reason = outcome.reason if isinstance(outcome, Never) else semconv.EXPORT_REFUSED
            self._availability.refused(load.count, outcome.error, now)
            load.delivery.settle(load.count, {reason: load.count})
        return True

    def leave_overdue(self) -> int:
        """Leave the exports that take too long; how many threads are held by them."""
        if not isinstance(self.exporter, OtlpExporter):  # it may not be called again before it has come back
            return 0
        limit = self.exporter.settings.timeout_seconds
        late = self._now() - limit - _GRACE_SECONDS
        overdue = [load for load, began in self.under_way.items() if began < late]
        for load in overdue:
            del self.under_way[load]
            # Another of the same: what comes of this one counts no more.
            self._later(load.again(), Later(f"no answer within {limit:g} s"), self._now())
        self._stuck += len(overdue)
        return len(overdue)

    def tick(self) -> None:
        """Tell of what goes on."""
        self._availability.tick(self._spans, self._size, self._now())

    # To the end.

    def hurry(self) -> None:
        """Somebody waits: try now, unless that was done just now, or the receiver has said when."""
        if not self._demanded and self._now() - self._failed_at > _HURRY_SECONDS:
            self._resume_at = 0.0

    def end_by(self, when: float) -> None:
        """Nothing is held back any more: what is not taken until then is lost."""
        self._end = when
        if not self._demanded:
            self._resume_at = 0.0

    @property
    def left(self) -> int:
        """How many spans wait or are under way."""
        return self._spans + sum(load.count for load in self.under_way)

    @property
    def over(self) -> bool:
        """Whether there is nothing left to wait for before the end."""
        waits = self.waiting and not (self._end is not None and self._resume_at > self._end)
        return not (waits or self.under_way)

    @property
    def size(self) -> int:
        """How many bytes wait."""
        return self._size

    def tell(self) -> None:
        """Say what is wrong, if that was not said yet."""
        if self.left:
            self._availability.tell(self._now())

    def give_up(self) -> None:
        """What is left is lost."""
        self.tell()
        for load in [*self.under_way, *self.waiting]:
            load.delivery.settle(load.count, {semconv.EXPORT_FAILED: load.count})
        self.waiting.clear()
        self.under_way.clear()
        self._size = self._spans = 0

    def _later(self, load: Load, outcome: Later, now: float) -> None:
        load.tries += 1
        self._availability.failed(outcome.error, now)
        self._failed_at = now
        if outcome.after_seconds is not None:
            self._demanded = True
            self._resume_at = max(self._resume_at, now + min(outcome.after_seconds, GIVE_UP_SECONDS))
        elif now >= self._resume_at:  # else it is one that was under way when another failed
            grown = self._wait_seconds * _GROWTH if self._wait_seconds else FIRST_WAIT_SECONDS
            self._wait_seconds = min(grown, FIRST_WAIT_SECONDS if self._end is not None else LONGEST_WAIT_SECONDS)
            self._demanded = False
            self._resume_at = now + self._wait_seconds * self._jitter(1 - _JITTER, 1 + _JITTER)
        self._keep(load, first=True)
        for old in [old for old in self.waiting if now - old.made >= GIVE_UP_SECONDS]:
            self._lose(old, semconv.EXPORT_FAILED)
        self._bound()

    def _bound(self) -> None:
        # The last one may be as large as it is: what it came from was bounded too.
        while len(self.waiting) > 1 and (self._size > self._bounds.size or self._spans > self._bounds.spans):
            self._lose(self.waiting[0], semconv.QUEUE_FULL)

    def _lose(self, load: Load, reason: str) -> None:
        self._forget(load)
        self._availability.lost(load.count)
        load.delivery.settle(load.count, {reason: load.count})

    def _keep(self, load: Load, *, first: bool = False) -> None:
        if first:
            self.waiting.appendleft(load)
        else:
            self.waiting.append(load)
        self._size += load.size * self._weight
        self._spans += load.count

    def _forget(self, load: Load) -> None:
        self.waiting.remove(load)
        self._size -= load.size * self._weight
        self._spans -= load.count


def _tries(load: Load) -> int:
    return load.tries
