"""Who was slow in a step: a rank that came late, a device with nothing to do, a host that did not launch in time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

    from otel_npu.relay.placing import Place, Ran
    from otel_npu.wire.frames import Stage

_FORWARD: Final = "forward"
_ALIKE: Final = 0.1
"""Of a stage's duration: a device that ends it so soon after the host had nothing else to do."""


class Straggler(NamedTuple):
    """The rank that started its forward last, and by how much later than the first."""

    rank: int
    skew_ns: int


def straggler(runs: Iterable[Ran], across: int) -> Straggler | None:
    """The rank for which the others waited in their collectives, or None: nobody was late, or it can't be told.

    Args:
        runs: The step's run of every rank.
        across: How many ranks share each stage of the pipeline; only they wait for each other so.
    """
    starts: dict[int, list[tuple[int, int, int]]] = {}
    for ran in runs:
        place = _forward(ran)
        if place is not None and place.uncertainty_ns is not None:
            starts.setdefault(ran.step.rank // across, []).append((place.start_ns, place.uncertainty_ns, ran.step.rank))
    late: Straggler | None = None
    for beside in starts.values():
        if len(beside) < across:
            continue
        (first_ns, first_off_ns, _), (last_ns, last_off_ns, rank) = min(beside), max(beside)
        skew_ns = last_ns - first_ns
        if skew_ns > max(first_off_ns + last_off_ns, 0 if late is None else late.skew_ns):
            late = Straggler(rank, skew_ns)
    return late


class Bubbles:
    """The time that the devices of one process have nothing to do between the steps of its rank."""

    def __init__(self) -> None:
        self._before: dict[int, tuple[int, int, int]] = {}
        """By device, of the step before: its start and end on the device, and its start on the host."""

    def before(self, ran: Ran) -> int | None:
        """Nanoseconds from the end of the step before to the start of this one, by the clock of its device.

        None where no stage was timed by a device, where there was no step before, and where the clock has jumped.
        """
        step, device = ran.step, ran.device
        if device is None:
            return None
        start_ns, end_ns = ran.extent
        before = self._before.get(device)
        self._before[device] = start_ns, end_ns, step.opened_ns
        if before is None or not before[0] <= start_ns <= before[1] + step.seen_ns - before[2]:
            return None
        return max(0, start_ns - before[1])  # on several streams they may overlap


def launch_bound(ran: Ran) -> bool | None:
    """Whether the device had done the step's longest outermost stage almost as soon as the host had launched it.

    None where no device timed it, or its clock is not sure enough.
    """
    timed = [
        (stage.duration_ns, stage, place)
        for stage, place in zip(ran.step.stages, ran.placed, strict=True)
        if stage.parent < 0 and stage.device_ns is not None
    ]
    if not timed:
        return None
    _, stage, place = max(timed, key=lambda entry: entry[0])
    return alike(stage, place)


def alike(stage: Stage, place: Place) -> bool | None:
    """Whether the device had done a stage that it timed almost as soon as the host; None where that is not sure."""
    little_ns = stage.duration_ns * _ALIKE
    if place.uncertainty_ns is None or place.uncertainty_ns > little_ns:
        return None
    return place.end_ns - stage.exited_ns <= little_ns


def _forward(ran: Ran) -> Place | None:
    """Where the rank's forward lies, if its device timed it."""
    for stage, place in zip(ran.step.stages, ran.placed, strict=True):
        if stage.name == _FORWARD:
            return place if stage.device_ns is not None else None
    return None
