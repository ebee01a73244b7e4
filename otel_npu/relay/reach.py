"""How far a step reaches on each of its devices: found in one pass, and asked by all who place, judge and count it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from otel_npu.wire.frames import Stage


class Reach:
    """What a step's stages on one device say, in nanoseconds.

    Attributes:
        first_ns: The first of their device times.
        last_ns: The last of them.
        near_first_ns: When the host entered the stage that has the first.
        near_last_ns: When it entered the one that has the last.
        least_ns: The least that host time minus device time can be: no event happened before it was enqueued.
        at_ns: The device time that says so.
    """

    __slots__ = ("at_ns", "first_ns", "last_ns", "least_ns", "near_first_ns", "near_last_ns")

    def __init__(self, first_ns: int, last_ns: int, near_ns: int, least_ns: int, at_ns: int) -> None:
        self.first_ns = first_ns
        self.last_ns = last_ns
        self.near_first_ns = self.near_last_ns = near_ns
        self.least_ns = least_ns
        self.at_ns = at_ns


def reaches(stages: Iterable[Stage]) -> dict[int, Reach]:
    """By device, the one that timed the first stage first; nothing of stages that the host timed."""
    found: dict[int, Reach] = {}
    reach: Reach | None = None
    device: int | None = None
    for stage in stages:
        first_ns = stage.device_ns
        if first_ns is None:
            continue
        last_ns, near_ns = first_ns + stage.duration_ns, stage.entered_ns
        least_ns, at_ns = near_ns - first_ns, first_ns
        at_end_ns = stage.exited_ns - last_ns
        if at_end_ns > least_ns:
            least_ns, at_ns = at_end_ns, last_ns
        if stage.device_index != device:
            device = stage.device_index
            reach = found.get(device)
        if reach is None:
            reach = found[stage.device_index] = Reach(first_ns, last_ns, near_ns, least_ns, at_ns)
            continue
        if first_ns < reach.first_ns:
            reach.first_ns, reach.near_first_ns = first_ns, near_ns
        if last_ns > reach.last_ns:
            reach.last_ns, reach.near_last_ns = last_ns, near_ns
        if least_ns > reach.least_ns:
            reach.least_ns, reach.at_ns = least_ns, at_ns
    return found
