"""Which steps are slow: judged by what is usual for steps of their kind."""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING, Final

from otel_npu import semconv
from otel_npu.capture.context import Limiter

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from otel_npu.drops import Drops

SLOW_PER_SECOND: Final = 3.0
"""So many slow steps a second are kept at most, by each process that judges."""
WINDOW: Final = 64
"""What is usual is the median of so many steps."""
ENOUGH: Final = 10
"""Nothing is judged before so many."""
_MAX_CLASSES: Final = 256
_FEW: Final = 32
_LOOK_EVERY: Final = 8


class _Usual:
    """What is usual for one kind of step. Worked out now and then: with each step it would be dear (cold caches)."""

    __slots__ = ("latest", "look_in", "median_ns")

    def __init__(self) -> None:
        self.latest: deque[int] = deque(maxlen=WINDOW)
        self.median_ns: float = math.inf
        self.look_in = ENOUGH
        """After so many more steps it is worked out again: soon as long as there are few."""

    def look(self) -> None:
        """Work it out."""
        self.median_ns = sorted(self.latest)[len(self.latest) // 2]
        self.look_in = 1 if len(self.latest) < _FEW else _LOOK_EVERY


class SlowSteps:
    """Judges steps by how long they took, in nanoseconds: a few comparisons a step, in bounded memory.

    Args:
        factor: How many times the usual a slow step takes at least; `math.inf` judges none.
        drops: Where slow steps beyond `SLOW_PER_SECOND` are counted.
        now: The host's monotonic clock in nanoseconds.
    """

    def __init__(self, factor: float, drops: Drops, now: Callable[[], int] | None = None) -> None:
        self._factor = factor
        self._drops = drops
        self._classes: dict[Hashable, _Usual] = {}
        self._limiter = Limiter(SLOW_PER_SECOND) if now is None else Limiter(SLOW_PER_SECOND, now)

    def judge(self, kind: Hashable, duration_ns: int, *, kept: bool = False) -> bool:
        """Whether a step of this kind is slow, and to be kept for it. It counts for what is usual either way.

        Args:
            kind: With which others it is compared.
            duration_ns: How long it took.
            kept: Whether it is kept anyway: then it is not to be kept for being slow.
        """
        if self._factor == math.inf:
            return False
        known = self._classes.get(kind)
        if known is None:
            if len(self._classes) >= _MAX_CLASSES:
                return False
            known = self._classes[kind] = _Usual()
        slow = duration_ns > self._factor * known.median_ns
        known.latest.append(duration_ns)
        known.look_in -= 1
        if not known.look_in:
            known.look()
        if not slow or kept:
            return False
        if not self._limiter.allow(""):
            self._drops.add(semconv.TOO_MANY_SLOW)
            return False
        return True
