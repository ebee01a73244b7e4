"""The slowest step of the last minute, and where its time went."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from otel_npu.relay.placing import Ran
    from otel_npu.wire.frames import Scheduled

MINUTE_SECONDS: Final = 60
_UNDER_WAY: Final = 64
_SECOND_NS: Final = 1_000_000_000


class _Step:
    """A step of an engine, or one of its own, whose ranks have told of it as far as they have."""

    def __init__(self) -> None:
        self.scheduled: Scheduled | None = None
        self.ranks: dict[int, Ran] = {}

    @property
    def complete(self) -> bool:
        return self.scheduled is not None and len(self.ranks) >= self.scheduled.ranks

    @property
    def last(self) -> Ran:
        """The rank that ended last."""
        return max(self.ranks.values(), key=lambda ran: ran.end_ns)

    @property
    def start_ns(self) -> int:
        first_ns = min(ran.start_ns for ran in self.ranks.values())
        return first_ns if self.scheduled is None else min(first_ns, self.scheduled.opened_ns)

    @property
    def duration_ns(self) -> int:
        return self.last.end_ns - self.start_ns


class Slowest:
    """Keeps the slowest step of each of the last seconds."""

    def __init__(self) -> None:
        self._under_way: dict[bytes, _Step] = {}
        self._by_second: dict[int, _Step] = {}

    def scheduled(self, frame: Scheduled) -> None:
        """An engine has scheduled a step."""
        step = self._step(frame.span_id)
        step.scheduled = frame
        self._look(frame.span_id, step)

    def ran(self, ran: Ran) -> None:
        """A rank has run its part, or a program a step of its own."""
        if ran.step.rank >= 0 and ran.step.parent_span_id:
            step = self._step(ran.step.parent_span_id)
            step.ranks[ran.step.rank] = ran
            self._look(ran.step.parent_span_id, step)
        elif not ran.step.bare and ran.step.stages:
            step = _Step()
            step.ranks[ran.step.rank] = ran
            self._judge(step)

    def last_minute(self) -> dict[str, Any] | None:
        """The slowest of the last minute: what it was, and when its stages began and how long they took."""
        last = max(self._by_second, default=0)
        recent = [step for second, step in self._by_second.items() if second > last - MINUTE_SECONDS]
        return _described(max(recent, key=lambda step: step.duration_ns)) if recent else None

    def _step(self, span_id: bytes) -> _Step:
        step = self._under_way.get(span_id)
        if step is None:
            step = self._under_way[span_id] = _Step()
            if len(self._under_way) > _UNDER_WAY:  # of the oldest no more will come
                oldest = self._under_way.pop(next(iter(self._under_way)))
                if oldest.ranks:
                    self._judge(oldest)
        return step

    def _look(self, span_id: bytes, step: _Step) -> None:
        if step.complete:
            del self._under_way[span_id]
            self._judge(step)

    def _judge(self, step: _Step) -> None:
        second = step.last.end_ns // _SECOND_NS
        if second not in self._by_second or step.duration_ns > self._by_second[second].duration_ns:
            self._by_second[second] = step
            if len(self._by_second) > MINUTE_SECONDS:
                del self._by_second[min(self._by_second)]


def _described(step: _Step) -> dict[str, Any]:
    ran, scheduled, start_ns = step.last, step.scheduled, step.start_ns
    bars = []
    if scheduled is not None:
        bars.append(_bar("schedule", 0, scheduled.opened_ns - start_ns, scheduled.scheduled_ns - start_ns, ""))
    depths: list[int] = []
    for stage, place in zip(ran.step.stages, ran.placed, strict=True):
        depths.append(depths[stage.parent] + 1 if stage.parent >= 0 else 0)
        timing = "host" if stage.device_ns is None else "device"
        bars.append(_bar(stage.name, depths[-1], place.start_ns - start_ns, place.end_ns - start_ns, timing))
    return {
        "number": ran.step.number if scheduled is None else scheduled.number,
        "kind": ran.step.kind,
        "ms": step.duration_ns * 1e-6,
        "tokens": None if scheduled is None else scheduled.total_tokens,
        "requests": None if scheduled is None else scheduled.total_requests,
        "rank": ran.step.rank if ran.step.rank >= 0 else None,
        "ranks": len(step.ranks),
        "stages": bars,
    }


def _bar(name: str, depth: int, start_ns: int, end_ns: int, timing: str) -> dict[str, Any]:
    return {
        "name": name,
        "depth": depth,
        "start_ms": start_ns * 1e-6,
        "ms": (end_ns - start_ns) * 1e-6,
        "timing": timing,
    }
