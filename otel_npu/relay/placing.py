"""Where a step's stages lie on the host's monotonic clock: within every bound, and with what is known of how sure."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

from otel_npu.relay.clock import DeviceClock
from otel_npu.relay.reach import reaches

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from otel_npu.relay.clock import Placement
    from otel_npu.relay.reach import Reach
    from otel_npu.wire.frames import Ping, Stage, Step


class Place(NamedTuple):
    """Where a stage lies on the host's monotonic clock, in nanoseconds, and how sure that is."""

    start_ns: int
    end_ns: int
    uncertainty_ns: int | None


class Ran:
    """A step that ran, and where it did on the host's monotonic clock, in nanoseconds.

    Attributes:
        step: The step.
        reaches: How far it reaches on each of its devices.
        placed: Where its stages lie.
        start_ns: Where it starts, what is inside it included.
        end_ns: Where that ends.
        unix_ns: Unix time minus monotonic time, as the step's own spans have it.
        has_device: Whether its process has a device beside the host: then a stage that the host timed is an exception.
        idle_ns: How long the device had nothing of the step before and not yet of this one; None where that can't be
            told.
    """

    __slots__ = ("_place", "end_ns", "has_device", "idle_ns", "placed", "reaches", "start_ns", "step", "unix_ns")

    placed: list[Place]
    start_ns: int
    end_ns: int

    def __init__(
        self,
        step: Step,
        placed: Placed | Callable[[Ran], Placed],
        unix_ns: int,
        *,
        has_device: bool,
    ) -> None:
        """Make one. Where it lies may be found out later: of most ranks' steps nobody asks."""
        self.step = step
        self.reaches = reaches(step.stages)
        self.unix_ns = unix_ns
        self.has_device = has_device
        self.idle_ns: int | None = None
        if callable(placed):
            self._place = placed
        else:
            self.placed, self.start_ns, self.end_ns = placed

    def __getattr__(self, name: str) -> Any:
        if name not in ("placed", "start_ns", "end_ns"):
            raise AttributeError(name)
        self.placed, self.start_ns, self.end_ns = self._place(self)
        return getattr(self, name)

    @property
    def extent(self) -> tuple[int, int]:
        """From where to where it reaches, by the clock of the device that timed its first stage, or by the host's."""
        for reach in self.reaches.values():
            return reach.first_ns, reach.last_ns
        return self.step.opened_ns, max(self.step.opened_ns, self.step.closed_ns)

    @property
    def device(self) -> int | None:
        """The device that timed its first stage; None where the host timed all."""
        return next(iter(self.reaches), None)


Placed: TypeAlias = tuple[list[Place], int, int]
"""Where stages lie, and from where to where the step does."""
MAX_DEVICES: Final = 128
_PINGS: Final = 4
_new_tuple: Final = tuple.__new__
_Group: TypeAlias = tuple[int, int, int, int]
"""A stage and the stages inside it: the least and the most that host time minus device time can be there, and the
first and the last device time. (A plain tuple, because one is made for each stage.)"""


class _Line(NamedTuple):
    """Host time minus device time across a step: a line between the step's two ends, and how far it may be off.

    What is possible at a device time is convex (see `relay.clock`), so in between it is never more than at one end.
    """

    first_ns: int
    shift_ns: int
    rate: float
    uncertainty_ns: int

    @classmethod
    def through(cls, first_ns: int, first: Placement, last_ns: int, last: Placement) -> _Line:
        """The line through the placements of two device times."""
        shift_ns, length_ns = first.host_ns - first_ns, max(1, last_ns - first_ns)
        rate = (last.host_ns - last_ns - shift_ns) / length_ns
        return cls(first_ns, shift_ns, rate, max(first.uncertainty_ns, last.uncertainty_ns))

    def place(self, group: _Group, least: int) -> tuple[int, int]:
        """The shift in the group's middle, within its bounds and not below `least`, and how far off it may be in it."""
        earliest, latest, first_ns, last_ns = group
        wanted = self.shift_ns + round(self.rate * ((first_ns + last_ns) / 2 - self.first_ns))
        # Where the bounds leave nothing, the enqueueing is the one that is certain.
        shift_ns = max(min(wanted, latest), earliest, least)
        # The two clocks' rates differ, so one shift can't be right at both ends.
        bend_ns = abs(self.rate) * (last_ns - first_ns) / 2
        return shift_ns, self.uncertainty_ns + abs(shift_ns - wanted) + int(bend_ns) + 1


class Timeline:
    """The clocks of one process's devices, and the placing by them.

    Args:
        resolution_ns: What the devices' times are truncated to.
    """

    def __init__(self, resolution_ns: int) -> None:
        self._resolution_ns = resolution_ns
        self._clocks: dict[int, DeviceClock] = {}
        self._pings: dict[int, deque[Ping]] = {}
        """By device, the latest that nothing has been learned from yet."""

    def ping(self, ping: Ping) -> None:
        """A look at a device's clock: learned from when a step comes, because an idle server looks all the time."""
        pings = self._pings.get(ping.device_index)
        if pings is None:
            self._clock(ping.device_index)
            pings = self._pings[ping.device_index] = deque(maxlen=_PINGS)
        pings.append(ping)

    def learn(self, reaches: Mapping[int, Reach], seen_ns: int) -> None:
        """What a step says about its devices' clocks: of each side's bounds the tightest will do.

        Args:
            reaches: Of the step.
            seen_ns: When the host had seen all of it done.
        """
        for device, reach in reaches.items():
            clock = self._clock(device)
            clock.lower(reach.at_ns, reach.at_ns + reach.least_ns)
            clock.upper(reach.last_ns, seen_ns)

    def place(self, step: Step, reaches: Mapping[int, Reach]) -> list[Place]:
        """Place each outermost stage by its middle; the stages inside keep their exact distances from it."""
        stages = step.stages
        nest(stages)
        roots, groups = _groups(step)
        lines = {device: self._line(device, reach) for device, reach in reaches.items()}
        shifts: dict[int, tuple[int, int | None]] = {}
        started: dict[tuple[int, int], int] = {}
        placed: list[Place] = []
        for index, stage in enumerate(stages):
            device_ns, parent = stage.device_ns, stage.parent
            if device_ns is None:
                entered_ns = stage.entered_ns
                place = _new_tuple(Place, (entered_ns, entered_ns + stage.duration_ns, None))
            else:
                root = roots[index]
                if root == index:
                    group, line = groups[index], lines[stage.device_index]
                    stream = stage.device_index, stage.stream_id
                    # A stream works in order, whatever the bounds of each have done.
                    least = started.get(stream, device_ns + group[0]) - device_ns
                    shift = (max(group[0], least), None) if line is None else line.place(group, least)
                    started[stream] = device_ns + shift[0]
                    shifts[index] = shift
                shift_ns, uncertainty_ns = shifts[root]
                start_ns = device_ns + shift_ns
                place = _new_tuple(Place, (start_ns, start_ns + stage.duration_ns, uncertainty_ns))
            if parent >= 0 and _same_stream(stage, stages[parent]):
                # On another stream, or by another clock, it may well reach beyond what is around it.
                place = _within(place, placed[parent])
            placed.append(place)
        return placed

    def _line(self, device: int, reach: Reach) -> _Line | None:
        """The line through a step's first and last time on a device; None where there is no map yet."""
        clock = self._clocks[device]
        start, end = clock.at(reach.first_ns, reach.near_first_ns), clock.at(reach.last_ns, reach.near_last_ns)
        return None if start is None or end is None else _Line.through(reach.first_ns, start, reach.last_ns, end)

    def _clock(self, device_index: int) -> DeviceClock:
        clock = self._clocks.get(device_index)
        if clock is None:
            if len(self._clocks) >= MAX_DEVICES:
                raise ValueError(f"a process with more than {MAX_DEVICES} devices")
            clock = self._clocks[device_index] = DeviceClock(self._resolution_ns)
        pings = self._pings.get(device_index)
        while pings:
            ping = pings.popleft()
            clock.lower(ping.device_ns, ping.before_ns)
            clock.upper(ping.device_ns, ping.seen_ns)
        return clock


def nest(stages: list[Stage]) -> None:
    """Say of each stage which is the innermost around it: it was entered before and exited after."""
    around: list[int] = []  # the stages, by index, that the next one may lie in
    last_exit_ns = 0
    for index, stage in enumerate(stages):
        entered_ns, exited_ns = stage.entered_ns, stage.exited_ns
        stage.parent = -1
        if entered_ns >= last_exit_ns:  # as most do, it follows all that were before it
            around.clear()
        while around and stages[around[-1]].exited_ns <= entered_ns:
            around.pop()
        for outer in reversed(around):  # tasks of one thread may overlap without one being in the other
            if stages[outer].exited_ns >= exited_ns:
                stage.parent = outer
                break
        around.append(index)
        last_exit_ns = max(last_exit_ns, exited_ns)


def _groups(step: Step) -> tuple[list[int], dict[int, _Group]]:
    """Of each stage the outermost around it that its clock timed, and by those what they are together."""
    stages, seen_ns = step.stages, step.seen_ns
    roots: list[int] = []
    groups: dict[int, _Group] = {}
    for index, stage in enumerate(stages):
        first_ns, parent = stage.device_ns, stage.parent
        root = roots[parent] if parent >= 0 and _same_clock(stage, stages[parent]) else index
        roots.append(root)
        if first_ns is None:
            continue
        # Neither event can have happened before it was enqueued, nor after it was seen done.
        last_ns = first_ns + stage.duration_ns
        earliest, latest = max(stage.entered_ns - first_ns, stage.exited_ns - last_ns), seen_ns - last_ns
        if root != index:
            around = groups[root]
            earliest, latest = max(earliest, around[0]), min(latest, around[1])
            first_ns, last_ns = min(first_ns, around[2]), max(last_ns, around[3])
        groups[root] = earliest, latest, first_ns, last_ns
    return roots, groups


def _same_clock(stage: Stage, around: Stage) -> bool:
    return around.device_index == stage.device_index and (around.device_ns is None) == (stage.device_ns is None)


def _same_stream(stage: Stage, around: Stage) -> bool:
    return stage.stream_id == around.stream_id and _same_clock(stage, around)


def _within(place: Place, around: Place) -> Place:
    """The place, cut to what is around it: rounded times and different clocks may disagree a little."""
    if around.start_ns <= place.start_ns <= place.end_ns <= around.end_ns:
        return place
    start_ns = min(max(place.start_ns, around.start_ns), around.end_ns)
    return Place(start_ns, min(max(place.end_ns, start_ns), around.end_ns), place.uncertainty_ns)
