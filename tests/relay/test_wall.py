"""Unix time of monotonic instants."""

from __future__ import annotations

from dataclasses import dataclass, field

from otel_npu.relay.wall import WallClock

S, MS, US = 1_000_000_000, 1_000_000, 1_000


@dataclass
class Host:
    """A host whose wall clock can be set, and where reading a clock takes time."""

    monotonic_ns: int = 5 * S
    offset_ns: int = 1_700_000_000 * S
    reading_takes_ns: list[int] = field(default_factory=list)
    wall_readings: int = 0

    def monotonic(self) -> int:
        return self.monotonic_ns

    def unix(self) -> int:
        """Read in the middle of the time that it takes."""
        takes_ns = self.reading_takes_ns.pop(0) if self.reading_takes_ns else 0
        self.monotonic_ns += takes_ns // 2
        unix_ns = self.monotonic_ns + self.offset_ns
        self.monotonic_ns += takes_ns - takes_ns // 2
        self.wall_readings += 1
        return unix_ns

    def clock(self) -> WallClock:
        return WallClock(self.monotonic, self.unix)


def test_the_offset_leads_from_monotonic_to_unix_time() -> None:
    host = Host()
    assert host.clock().offset_ns() == host.offset_ns


def test_within_a_second_one_offset_serves_so_that_a_step_stays_together() -> None:
    host = Host()
    clock = host.clock()
    before_ns = clock.offset_ns()
    readings = host.wall_readings
    host.offset_ns += 3 * S  # the wall clock is set
    host.monotonic_ns += 999 * MS
    assert clock.offset_ns() == before_ns
    assert host.wall_readings == readings


def test_after_a_second_what_follows_is_placed_by_the_wall_clock_as_it_is_then() -> None:
    host = Host()
    clock = host.clock()
    for change_ns in (50 * US, -3600 * S, 0):  # slewed, set back, left alone
        host.offset_ns += change_ns
        host.monotonic_ns += S
        assert clock.offset_ns() == host.offset_ns


def test_of_some_readings_the_quickest_counts() -> None:
    """Between its two readings of the monotonic clock the process may have lost the processor."""
    host = Host(reading_takes_ns=[10 * MS, 40 * US, 200, 3 * MS, 80 * US])
    clock = WallClock(host.monotonic, lambda: host.unix() + (0 if host.wall_readings == 3 else 7 * MS))
    assert clock.offset_ns() == host.offset_ns


def test_without_arguments_it_is_this_hosts() -> None:
    import time

    before_ns = time.time_ns() - time.perf_counter_ns()
    offset_ns = WallClock().offset_ns()
    assert abs(offset_ns - before_ns) < S
