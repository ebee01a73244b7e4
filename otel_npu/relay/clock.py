"""Device time on the host's clock: from bounds alone, with a stated uncertainty.

Nobody can read both clocks at once, but causality bounds them: an event cannot have happened on the device
before the host enqueued it, nor after the host saw it done. With ``host = offset + rate * device`` each bound
is a half-plane of the (offset, rate) plane. What is left of the plane is a convex polygon, all lines that are
possible, and for any device time the lowest and the highest of them limit where the truth can lie: a proof,
not an estimate. A span is placed in the middle, and half the distance is its uncertainty.

This is the convex-hull method of clock synchronisation:

- A. Duda, G. Harrus, Y. Haddad, G. Bernard, "Estimating global time in distributed systems", 7th Int. Conf.
  on Distributed Computing Systems, 1987: all lines between the hulls of lower and upper bounds;
- S. B. Moon, P. Skelly, D. Towsley, "Estimation and removal of clock skew from network delay measurements",
  IEEE INFOCOM, 1999: the same as a linear program;
- B. Poirier, R. Roy, M. Dagenais, "Accurate offline synchronization of distributed traces using kernel-level
  events", ACM SIGOPS Operating Systems Review 44(3), 2010: the same for traces, with its guaranteed accuracy.

It is kept in its dual form, where each bound cuts the polygon as it comes and no bound is stored (E. Walter,
H. Piet-Lahanier, "Exact recursive polyhedral description of the feasible parameter set for bounded-error
models", IEEE Transactions on Automatic Control 34(8), 1989). The limits are those of the two hulls, but the
polygon has a handful of vertices however many bounds went into it, most bounds leave it alone, and it can
age: oscillators wander, so it grows by what a rate that changes no faster than `WANDER_PER_NS` can have done
since. That takes the place of a sliding window: a bound weighs ever less, and newer ones take over.
"""

from __future__ import annotations

import math
from collections import deque
from typing import NamedTuple

RATE_LIMIT = 200e-6
"""How far apart two clocks' rates can be: crystals keep within 50 to 100 ppm each, over heat and age."""

WANDER_PER_NS = 10e-6 / 60e9
"""How fast that difference can change: 10 ppm a minute. A crystal moves by a few tenths of a ppm a degree, a
board that comes under load warms by degrees a minute, and NTP steers the host's clock by a few ppm at once.
Half of this times t^2 is what t old bounds are worth less: 0.1 us after 1 s, 8 us after 10 s. A tenth of it
would narrow the median uncertainty of ``benchmarks/clock_error.py`` from 13 to 9 us only."""

TOLERANCE_NS = 1_000
"""A bound that misses all that is possible by less is ignored: two cores' clocks may differ by so much."""

CORROBORATION_NS = 30_000_000_000
"""A contradiction is a jump of the clock only if another one agrees within this time; else an outlier."""

MEMORY_NS = 120_000_000_000
"""For how long after a jump spans from before it are still looked for."""

_ADVANCE_NS = 3_000_000_000  # The polygon ages in steps of this; in between that costs at most 0.8 us.
_MAX_VERTICES = 12
_UNBOUNDED_NS = 1e15  # 11 days: where the polygon of a new segment ends on the side that has no bound yet.
_UNCONFIRMED_NS = 1_000_000_000  # How much nearer to the truth a segment must look while it is a candidate.

_Polygon = list[tuple[float, float]]  # Vertices, counter-clockwise: (offset in ns, rate).


class Placement(NamedTuple):
    """A device time on the host's monotonic clock."""

    host_ns: int
    """The middle of what is possible, in nanoseconds."""
    uncertainty_ns: int
    """Half of what is possible: the truth is no farther than this from `host_ns`."""


class DeviceClock:
    """Map from one device's clock to the monotonic clock of one host. Times are nanoseconds.

    Bounds may come in any order. One that contradicts all that is possible opens a candidate for a new
    segment: either the clock has jumped (a device reset, a suspended host), or the bound is wrong. A second
    contradiction that agrees with the candidate makes it the current segment; a bound that fits the current
    segment and not the candidate proves the candidate wrong. A segment is never bent to meet another.

    Args:
        resolution_ns: What readings of the device's clock are truncated to. The true device time lies in
            ``[reading, reading + resolution_ns)``.
    """

    def __init__(self, resolution_ns: int = 0) -> None:
        self._resolution_ns = resolution_ns
        self._current: _Segment | None = None
        self._candidate: _Segment | None = None
        self._past: deque[_Segment] = deque(maxlen=4)
        self.resets = 0
        """How often a jump of the clock has started a new segment."""

    def lower(self, device_ns: int, host_ns: int) -> None:
        """What the device did at `device_ns` cannot have happened before `host_ns`: it was enqueued then."""
        device_ns += self._resolution_ns
        segment = self._current
        if segment is not None and self._candidate is None:
            elapsed = device_ns - segment.device_ns
            # Most bounds from stages end here: too loose to tell anything, whatever the rate.
            if host_ns - segment.host_ns - elapsed < segment.earliest - RATE_LIMIT * abs(elapsed):
                return
        self._observe(1, device_ns, host_ns)

    def upper(self, device_ns: int, host_ns: int) -> None:
        """What the device did at `device_ns` cannot have happened after `host_ns`: it was seen done then."""
        segment = self._current
        if segment is not None and self._candidate is None:
            elapsed = device_ns - segment.device_ns
            if host_ns - segment.host_ns - elapsed > segment.latest + RATE_LIMIT * abs(elapsed):
                return
        self._observe(-1, device_ns, host_ns)

    def at(self, device_ns: int, near_host_ns: int | None = None) -> Placement | None:
        """Place a device time; None as long as there are bounds from one side only.

        As long as no bound comes in between, places keep the order of device times. A bound may move what
        follows, within the uncertainty: place a step's two ends together, and what is inside between them.

        Args:
            device_ns: A reading of the device's clock.
            near_host_ns: A host time not far from it (when it was enqueued). It tells times from before and
                after a jump of the clock apart; without it the current segment is taken.
        """
        segment = self._current
        if segment is None:
            return None
        if near_host_ns is not None and (
            self._candidate is not None or (self._past and near_host_ns - segment.begin_ns < MEMORY_NS)
        ):
            segment = self._nearest(segment, device_ns, near_host_ns)
        return segment.place(device_ns, self._resolution_ns)

    def _observe(self, sign: int, device_ns: int, host_ns: int) -> None:
        current, candidate = self._current, self._candidate
        if current is None:
            self._current = _Segment(sign, device_ns, host_ns, begin_ns=-math.inf)
            return
        if host_ns < current.begin_ns:  # From before the last jump.
            return
        fits = current.cut(sign, device_ns, host_ns)
        if candidate is None:
            if not fits:
                self._candidate = _Segment(sign, device_ns, host_ns, begin_ns=host_ns)
            return
        if host_ns < candidate.begin_ns:
            return
        expired = host_ns - candidate.begin_ns > CORROBORATION_NS
        if expired or not candidate.cut(sign, device_ns, host_ns):
            self._candidate = None if fits else _Segment(sign, device_ns, host_ns, begin_ns=host_ns)
        elif not fits and candidate.bounded:
            current.end_ns = candidate.begin_ns
            self._past.append(current)
            self._current, self._candidate = candidate, None
            self.resets += 1

    def _nearest(self, current: _Segment, device_ns: int, near_host_ns: int) -> _Segment:
        """The segment that places `device_ns` nearest to `near_host_ns` and to the segment's own time."""

        def miss(segment: _Segment) -> float:
            placement = segment.place(device_ns, self._resolution_ns)
            if placement is None:
                return math.inf
            host_ns = placement.host_ns
            outside = max(segment.begin_ns - host_ns, host_ns - segment.end_ns, 0)
            return abs(host_ns - near_host_ns) + outside + (_UNCONFIRMED_NS if segment is self._candidate else 0)

        segments = [current, *self._past]
        if self._candidate is not None:
            segments.append(self._candidate)
        return min(segments, key=miss)


class _Segment:
    """All lines that are possible between two jumps of the clock, as tangents at one moment.

    A line takes the device time ``device_ns + elapsed`` to the host time ``host_ns + elapsed + offset + rate
    * elapsed``. Differences from a moment nearby keep floats exact far below a nanosecond, whatever the
    clocks show. One of the lines is the tangent of the true relation at that moment.
    """

    __slots__ = ("begin_ns", "bounded", "device_ns", "earliest", "end_ns", "host_ns", "latest", "polygon")

    def __init__(self, sign: int, device_ns: int, host_ns: int, begin_ns: float) -> None:
        self.begin_ns = begin_ns
        self.end_ns = math.inf
        self.device_ns = device_ns
        self.host_ns = host_ns
        low, high = sorted((0.0, sign * _UNBOUNDED_NS))
        self._become([(low, -RATE_LIMIT), (high, -RATE_LIMIT), (high, RATE_LIMIT), (low, RATE_LIMIT)])

    def place(self, device_ns: int, resolution_ns: int) -> Placement | None:
        """The middle and the half-width of what is possible for a reading of the device's clock."""
        if not self.bounded:
            return None
        elapsed = device_ns - self.device_ns
        offsets = [offset + rate * elapsed for offset, rate in self.polygon]
        low, high = min(offsets), max(offsets) + resolution_ns * (1 + RATE_LIMIT)
        return Placement(
            self.host_ns + elapsed + round((low + high) / 2),
            int((high - low) / 2 + _bend(elapsed)) + 2,  # 1 for rounding here down, 1 for rounding the place.
        )

    def cut(self, sign: int, device_ns: int, host_ns: int) -> bool:
        """Keep the lines above (sign 1) or below (-1) a bound; if there are none, keep all, return False."""
        elapsed = device_ns - self.device_ns
        bend = _bend(elapsed)
        bound = sign * (host_ns - self.host_ns - elapsed)
        distances = [sign * (offset + rate * elapsed) - bound for offset, rate in self.polygon]
        nearest, farthest = min(distances), max(distances)
        if nearest >= bend:
            return True
        if farthest <= -bend:
            return farthest > -bend - TOLERANCE_NS
        if elapsed > _ADVANCE_NS and self.bounded:
            self._advance(elapsed)
            return self.cut(sign, device_ns, host_ns)
        if nearest < -bend:
            self._become(_clip(self.polygon, [distance + bend for distance in distances]))
        return True

    def _advance(self, elapsed: int) -> None:
        """Take the tangents at a later moment, and add what a changing rate can have done in the meantime."""
        offset_change, rate_change = _bend(elapsed), WANDER_PER_NS * elapsed
        moved = int(self.earliest + self.polygon[0][1] * elapsed)  # Goes into `host_ns`: offsets stay small.
        polygon = _hull(
            [
                (offset + rate * elapsed - moved + more_offset, rate + more_rate)
                for offset, rate in self.polygon
                for more_offset in (-offset_change, offset_change)
                for more_rate in (-rate_change, rate_change)
            ]
        )
        for sign in (1, -1):
            polygon = _clip(polygon, [RATE_LIMIT - sign * rate for _, rate in polygon])
        self.device_ns += elapsed
        self.host_ns += elapsed + moved
        self._become(polygon)

    def _become(self, polygon: _Polygon) -> None:
        while len(polygon) > _MAX_VERTICES:
            polygon = _without_least_edge(polygon)
        self.polygon = polygon
        self.earliest, self.latest = min(polygon)[0], max(polygon)[0]
        self.bounded = self.latest - self.earliest < _UNBOUNDED_NS / 2


def _bend(elapsed: int) -> float:
    """How far the true relation can be off its tangent `elapsed` ns away from where the two touch, in ns."""
    return min(WANDER_PER_NS / 2 * elapsed * elapsed, 2 * RATE_LIMIT * abs(elapsed))


def _clip(polygon: _Polygon, distances: list[float]) -> _Polygon:
    """The part of a polygon on the positive side of a line, given each vertex's distance from it."""
    kept: _Polygon = []
    before, distance_before = polygon[-1], distances[-1]
    for vertex, distance in zip(polygon, distances, strict=True):
        if distance < 0 < distance_before or distance_before < 0 < distance:
            share = distance_before / (distance_before - distance)
            kept.append((before[0] + share * (vertex[0] - before[0]), before[1] + share * (vertex[1] - before[1])))
        if distance >= 0:
            kept.append(vertex)
        before, distance_before = vertex, distance
    return kept


def _turn(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> float:
    """Positive if the way from a over b to c turns left, and then twice the area of their triangle."""
    return (b[0] - a[0]) * (c[1] - b[1]) - (b[1] - a[1]) * (c[0] - b[0])


def _hull(points: _Polygon) -> _Polygon:
    """The convex hull, counter-clockwise (Andrew's monotone chain)."""
    points.sort()
    hull: _Polygon = []
    for way in (points, points[::-1]):
        chain: _Polygon = []
        for point in way:
            while len(chain) > 1 and _turn(chain[-2], chain[-1], point) <= 0:
                chain.pop()
            chain.append(point)
        hull += chain[:-1]
    return hull


def _without_least_edge(polygon: _Polygon) -> _Polygon:
    """A polygon around this one with an edge less: that edge's neighbours are prolonged until they meet.

    Of all edges the one is dropped that adds the least area. No line that is possible is ever lost.
    """
    least, best, corner = math.inf, 0, polygon[0]
    for i, after in enumerate(polygon):
        before, start, end = polygon[i - 3], polygon[i - 2], polygon[i - 1]
        along = (start[0] - before[0], start[1] - before[1])
        back = (after[0] - end[0], after[1] - end[1])
        converge = along[0] * back[1] - along[1] * back[0]
        if converge > 0:
            share = ((end[0] - start[0]) * back[1] - (end[1] - start[1]) * back[0]) / converge
            area = share * _turn(before, start, end)
            if area < least:
                least, best, corner = area, i, (start[0] + share * along[0], start[1] + share * along[1])
    if least == math.inf:  # A sliver thinner than floats can tell: the rectangle around it.
        (low, high), (slow, fast) = ((min(axis), max(axis)) for axis in zip(*polygon, strict=True))
        return [(low, slow), (high, slow), (high, fast), (low, fast)]
    rotated = polygon[best:] + polygon[:best]  # The dropped edge is now the last one.
    return [*rotated[:-2], corner]
