"""A ping: an event of its own, bracketed by host times, that says what the device's clock shows now."""

from __future__ import annotations

from time import perf_counter_ns
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable


class Ping(NamedTuple):
    """The device's clock showed `device_ns` between two instants of the host's, all in nanoseconds."""

    device_ns: int
    before_ns: int
    seen_ns: int


def ping(
    record: Callable[[], object],
    done: Callable[[], bool],
    read: Callable[[], int],
    budget_ns: int,
    now: Callable[[], int] = perf_counter_ns,
) -> Ping | None:
    """Record, and look until it is done; None when that takes longer than the budget.

    Args:
        record: Records the event on a stream with nothing else on it.
        done: Whether the event is done.
        read: The device's clock at the event, once it is done.
        budget_ns: For how long to look.
        now: The host's monotonic clock.
    """
    before_ns = now()
    record()
    while not done():
        if now() - before_ns > budget_ns:
            return None
    seen_ns = now()
    return Ping(read(), before_ns, seen_ns)
