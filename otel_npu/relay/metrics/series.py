"""Counting: the series of one metric, in bounded number. Values are whole numbers, so that sums are exact.

The SDK's own instruments take 15 us a value with seven attributes. Here a series is found by a tuple: it is one.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable

    from otel_npu.semconv import Metric

Value: TypeAlias = str | int | None
"""Of an attribute; None where a series has it not."""
Key: TypeAlias = tuple[Value, ...]
"""A series by the values of its metric's attributes, in their order."""

MAX_SERIES: Final = 4096
"""Of one metric; what is beyond them is counted under `other`."""


class Exemplar(NamedTuple):
    """A value, when it was, and the span that has it; no ids where there is none."""

    value: int
    unix_ns: int
    trace_id: int | None
    span_id: int | None


class Total:
    """The one series of a counter, or the last value of a gauge."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0


class Distribution:
    """The one series of a histogram with these bounds, each the most that its bucket takes."""

    __slots__ = ("bounds", "buckets", "exemplars", "largest", "smallest", "total")

    def __init__(self, bounds: tuple[int, ...]) -> None:
        self.bounds = bounds
        self.buckets = [0] * (len(bounds) + 1)
        self.total = self.largest = 0
        self.smallest: float = math.inf
        self.exemplars: dict[int, Exemplar] = {}
        """The last of each bucket since they were taken."""

    @property
    def count(self) -> int:
        """How many values."""
        return sum(self.buckets)

    def add(self, value: int) -> None:
        """Count a value, 0 or more."""
        self.buckets[bisect_left(self.bounds, value)] += 1
        self.total += value
        # Not max() and min(): they take longer than the rest.
        if value > self.largest:  # noqa: PLR1730
            self.largest = value
        if value < self.smallest:  # noqa: PLR1730
            self.smallest = value


class ExponentialDistribution(Distribution):
    """The same with buckets that grow by a constant factor, as fine as so many of them allow."""

    __slots__ = ("exponents", "max_size", "scale", "unit", "zeros")

    def __init__(self, bounds: tuple[int, ...], unit: float, max_size: int, max_scale: int) -> None:
        super().__init__(bounds)
        self.unit = unit
        self.max_size = max_size
        self.scale = max_scale
        self.zeros = 0
        self.exponents: dict[int, int] = {}
        """Bucket `i` takes what is above `base ** i` and at most `base ** (i + 1)`; `base` is 2 ** 2 ** -scale."""

    def add(self, value: int) -> None:
        """Count a value, 0 or more."""
        super().add(value)
        if not value:
            self.zeros += 1
            return
        exponent = self._exponent(value)
        exponents = self.exponents
        if exponent not in exponents:
            while exponents and (max(exponent, *exponents) - min(exponent, *exponents) >= self.max_size):
                self._widen()
                exponents, exponent = self.exponents, exponent >> 1
        exponents[exponent] = exponents.get(exponent, 0) + 1

    def _exponent(self, value: int) -> int:
        return math.ceil(math.log2(value * self.unit) * 2.0**self.scale) - 1

    def _widen(self) -> None:
        """Make each two buckets one."""
        self.scale -= 1
        merged: dict[int, int] = {}
        for exponent, count in self.exponents.items():
            merged[exponent >> 1] = merged.get(exponent >> 1, 0) + count
        self.exponents = merged


class Names:
    """The values of attributes that come from outside: so many different ones of each, and the others are `other`.

    Args:
        count: Told of each value that is `other`.
    """

    OTHER: Final = "other"
    MAX_NAMES: Final = 256

    def __init__(self, count: Callable[[], None]) -> None:
        self._count = count
        self._known: dict[str, set[Value]] = {}

    def bounded(self, attribute: str, value: Value) -> Value:
        """The value, or `other`."""
        known = self._known.setdefault(attribute, set())
        if value in known or value is None:
            return value
        if len(known) < self.MAX_NAMES:
            known.add(value)
            return value
        self._count()
        return self.OTHER

    def overflow(self, length: int) -> Key:
        """The series of what is beyond the last."""
        self._count()
        return (self.OTHER,) * length


class Family:
    """All series of one metric.

    Args:
        metric: Which one.
        names: Bounds the values of its attributes.
        exponential: The most buckets and the finest scale of an exponential histogram; None for explicit bounds.
    """

    __slots__ = ("_exponential", "_names", "metric", "series")

    def __init__(self, metric: Metric, names: Names, exponential: tuple[int, int] | None) -> None:
        self.metric = metric
        self.series: dict[Key, Distribution | Total] = {}
        self._names = names
        self._exponential = exponential

    def record(self, key: Key, value: int) -> None:
        """Count a value of a histogram, in nanoseconds or as a whole number."""
        self.at(key).add(value)

    def add(self, key: Key, value: int) -> None:
        """Count so much more."""
        self.at(key).value += value

    def put(self, key: Key, value: int) -> None:
        """A gauge has this value now."""
        self.at(key).value = value

    def at(self, key: Key) -> Any:
        """The series of a key: a `Distribution` of a histogram, else a `Total`."""
        return self.series.get(key) or self._new(key)

    def exemplify(self, key: Key, exemplar: Exemplar) -> None:
        """A span has this value, which was counted before."""
        series = self.series.get(key)
        if isinstance(series, Distribution):
            series.exemplars[bisect_left(series.bounds, exemplar.value)] = exemplar

    def take(self) -> dict[Key, Distribution | Total]:
        """All series; they begin anew."""
        series, self.series = self.series, {}
        return series

    def _new(self, key: Key) -> Distribution | Total:
        """The series of a key that has none yet, which may be that of the many."""
        key = tuple(map(self._names.bounded, self.metric.attributes, key))
        if key not in self.series:
            if len(self.series) >= MAX_SERIES:
                key = self._names.overflow(len(key))
            if key not in self.series:
                self.series[key] = self._empty()
        return self.series[key]

    def _empty(self) -> Distribution | Total:
        bounds = self.metric.bounds
        if not bounds:
            return Total()
        if self._exponential is None:
            return Distribution(bounds)
        return ExponentialDistribution(bounds, unit_of(self.metric), *self._exponential)


def unit_of(metric: Metric) -> float:
    """What one is that was counted, in the metric's own unit: times are counted in nanoseconds."""
    return 1e-9 if metric.unit == "s" else 1
