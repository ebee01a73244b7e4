"""What was counted, as the SDK's readers take it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

from opentelemetry.sdk import metrics as sdk
from opentelemetry.sdk.metrics import export
from opentelemetry.sdk.resources import Resource

from otel_npu import semconv
from otel_npu.relay.metrics.series import ExponentialDistribution, Total, unit_of
from otel_npu.relay.own_span import SCOPE
from otel_npu.relay.resources import resource_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from opentelemetry.sdk.metrics.export import MetricReader

    from otel_npu.relay.metrics.books import Book, Shelf
    from otel_npu.relay.metrics.series import Distribution, Exemplar, Key

# OpenTelemetry 1.27 knows no exemplars.
_EXEMPLAR: Final[Any] = getattr(sdk, "Exemplar", None)
_OF_ITS_PROCESS: Final = (semconv.PROCESS_PID, semconv.SERVICE_INSTANCE_ID)


class Source:
    """What one reader reads.

    Args:
        reader: The reader; it collects from here from now on.
        shelf: What was counted for it.
        before: Called before each collection, to bring up to date what is not counted as it happens.
        now_ns: Unix time in nanoseconds.
    """

    def __init__(
        self, reader: MetricReader, shelf: Shelf, before: Callable[[], None], now_ns: Callable[[], int] = time.time_ns
    ) -> None:
        self.reader = reader
        self._shelf = shelf
        self._before = before
        self._now_ns = now_ns
        self._resources: dict[Book, Resource] = {}
        self._began_ns = self._collected_ns = now_ns()
        collect: Any = self.collect
        reader._set_collect_callback(collect)

    def collect(self, reader: MetricReader, timeout_millis: float = 0) -> export.MetricsData | None:  # noqa: ARG002
        """All that was counted or, where the reader wants that, what was counted since the last time."""
        self._before()
        shelf = self._shelf
        with shelf.lock:
            now_ns = self._now_ns()
            services = [(book, self._metrics(book, now_ns)) for book in shelf.books]
            self._collected_ns = now_ns
        told = [
            export.ResourceMetrics(
                self._resource(book), [export.ScopeMetrics(SCOPE, metrics, semconv.SCHEMA_URL)], semconv.SCHEMA_URL
            )
            for book, metrics in services
            if metrics
        ]
        return export.MetricsData(told) if told else None

    def _resource(self, book: Book) -> Resource:
        """The service, whichever of its processes: points tell these apart by rank and device."""
        resource = self._resources.get(book)
        if resource is None:
            attributes = resource_of(book.hello).attributes
            of_service = {name: value for name, value in attributes.items() if name not in _OF_ITS_PROCESS}
            given = semconv.SERVICE_INSTANCE_ID in book.hello.resource_attributes
            of_service[semconv.SERVICE_INSTANCE_ID] = (
                attributes[semconv.SERVICE_INSTANCE_ID] if given else book.instance_id
            )
            resource = self._resources[book] = Resource(of_service)
        return resource

    def _metrics(self, book: Book, now_ns: int) -> list[export.Metric]:
        metrics, plan = [], self._shelf.plan
        for metric, family in book.families.items():
            if not family.series:
                continue
            delta = plan.delta and metric.kind != semconv.GAUGE
            series = family.take() if delta else family.series
            if delta:
                book.rows.clear()
            points = _Points(metric, self._collected_ns if delta else self._began_ns, now_ns).of(series)
            temporality = export.AggregationTemporality.DELTA if delta else export.AggregationTemporality.CUMULATIVE
            data: Any
            if metric.kind == semconv.GAUGE:
                data = export.Gauge(points)
            elif metric.kind == semconv.COUNTER:
                data = export.Sum(points, temporality, is_monotonic=True)
            elif plan.exponential is not None:
                data = export.ExponentialHistogram(points, temporality)
            else:
                data = export.Histogram(points, temporality)
            metrics.append(export.Metric(metric.name, metric.meaning, metric.unit, data))
        return metrics


class _Points:
    """Makes the points of one metric."""

    def __init__(self, metric: semconv.Metric, start_ns: int, now_ns: int) -> None:
        self._metric = metric
        self._start_ns = start_ns
        self._now_ns = now_ns
        self._unit = unit_of(metric)
        self._bounds = [semconv.seconds(bound) if self._unit != 1 else bound for bound in metric.bounds]

    def of(self, series: dict[Key, Distribution | Total]) -> list[Any]:
        """A point for each series."""
        return [self._point(key, value) for key, value in series.items()]

    def _point(self, key: Key, value: Distribution | Total) -> Any:
        common: dict[str, Any] = {
            "attributes": {
                name: each for name, each in zip(self._metric.attributes, key, strict=True) if each is not None
            },
            "start_time_unix_nano": self._start_ns,
            "time_unix_nano": self._now_ns,
        }
        if isinstance(value, Total):
            return export.NumberDataPoint(**common, value=value.value * self._unit)
        exemplars, value.exemplars = value.exemplars.values(), {}
        if _EXEMPLAR is not None:
            common["exemplars"] = [self._exemplar(exemplar) for exemplar in exemplars]
        common.update(
            count=value.count,
            sum=value.total * self._unit,
            min=value.smallest * self._unit,
            max=value.largest * self._unit,
        )
        if isinstance(value, ExponentialDistribution):
            return export.ExponentialHistogramDataPoint(
                **common,
                scale=value.scale,
                zero_count=value.zeros,
                positive=_buckets(value.exponents),
                negative=export.Buckets(0, []),
                flags=0,
            )
        return export.HistogramDataPoint(
            **common, bucket_counts=tuple(value.buckets), explicit_bounds=tuple(self._bounds)
        )

    def _exemplar(self, exemplar: Exemplar) -> Any:
        return _EXEMPLAR(
            filtered_attributes={},
            value=exemplar.value * self._unit,
            time_unix_nano=exemplar.unix_ns,
            span_id=exemplar.span_id,
            trace_id=exemplar.trace_id,
        )


def _buckets(exponents: dict[int, int]) -> export.Buckets:
    if not exponents:
        return export.Buckets(0, [])
    first, last = min(exponents), max(exponents)
    return export.Buckets(first, [exponents.get(exponent, 0) for exponent in range(first, last + 1)])
