"""For Prometheus to scrape: OpenTelemetry's own exporter, and what it leaves out: exemplars."""

from __future__ import annotations

import logging
import threading
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics.export import Histogram
from opentelemetry.trace import format_span_id, format_trace_id
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.samples import Exemplar

from otel_npu import semconv
from otel_npu.relay.metrics.plans import HOST, PORT

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from opentelemetry.sdk.metrics.export import HistogramDataPoint, MetricsData
    from prometheus_client.core import Metric

_log = logging.getLogger("otel_npu.relay")

DEFAULT_HOST: Final = "localhost"
DEFAULT_PORT: Final = 9464
_RETRY_SECONDS: Final = 5.0


class Scraped(PrometheusMetricReader):
    """Serves the metrics of one relay.

    A port that is in use is one line; it is tried again, because another relay of this server may just be about to end.

    Args:
        host: Where to listen.
        port: Where to listen; 0 takes any that is free.
    """

    def __init__(self, host: str, port: int) -> None:
        self._exposition = _Exposition()
        super().__init__(registry=self._exposition, resource_attribute_filter=lambda key: key == semconv.SERVICE_NAME)
        self._host, self._port = host, port
        self._ending = threading.Event()
        self._server: Any = None
        if not self._listen():
            _log.error(
                "%s:%d is in use or can't be listened on, so Prometheus can't scrape; tried again until it can: two "
                "servers on one host need a port each (%s, %s)",
                host,
                port,
                HOST,
                PORT,
            )
            threading.Thread(target=self._retry, name="otel-npu prometheus", daemon=True).start()

    @property
    def port(self) -> int:
        """Where it is served; 0 if it is not yet."""
        return self._server.server_port if self._server is not None else 0

    def shutdown(self, timeout_millis: float = 30_000, **kwargs: Any) -> None:
        """Serve no more."""
        super().shutdown(timeout_millis, **kwargs)
        self._ending.set()
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()

    def _receive_metrics(self, metrics_data: MetricsData, timeout_millis: float = 10_000, **kwargs: Any) -> None:
        self._exposition.points = _histograms(metrics_data)
        super()._receive_metrics(metrics_data, timeout_millis, **kwargs)

    def _listen(self) -> bool:
        try:
            self._server, _ = start_http_server(self._port, self._host, self._exposition)
        except OSError:
            return False
        return True

    def _retry(self) -> None:
        while not self._ending.wait(_RETRY_SECONDS):
            if self._listen():
                return


class _Exposition(CollectorRegistry):
    """What is scraped. OpenTelemetry's exporter makes samples without exemplars: they are put in here."""

    def __init__(self) -> None:
        super().__init__()
        self.points: list[list[HistogramDataPoint]] = []
        self._scrape = threading.Lock()

    def collect(self) -> Iterator[Metric]:
        """All metrics, the histograms with their exemplars."""
        with self._scrape:  # one at a time: what is collected for it lies in `points`
            families = list(super().collect())
            histograms = (family for family in families if family.type == "histogram")
            for family, points in zip(histograms, self.points, strict=False):
                _add_exemplars(family, points)
        yield from families


def _histograms(data: MetricsData) -> list[list[HistogramDataPoint]]:
    """The points of each histogram, of all services, in the order in which the exporter makes their samples."""
    by_name: dict[str, list[HistogramDataPoint]] = {}
    for resource in data.resource_metrics:
        for scope in resource.scope_metrics:
            for metric in scope.metrics:
                if isinstance(metric.data, Histogram):
                    by_name.setdefault(metric.name, []).extend(metric.data.data_points)
    return list(by_name.values())


def _add_exemplars(family: Metric, points: Iterable[HistogramDataPoint]) -> None:
    """Each point has a sample for each of its buckets, then its count and its sum."""
    samples = iter(list(family.samples))
    family.samples = []
    for point in points:
        exemplars = list(point.exemplars)
        for sample, bound in zip(
            list(islice(samples, len(point.bucket_counts))), [*point.explicit_bounds, float("inf")], strict=True
        ):
            inside = [exemplar for exemplar in exemplars if exemplar.value <= bound]
            exemplars = [exemplar for exemplar in exemplars if exemplar.value > bound]
            family.samples.append(sample._replace(exemplar=_exemplar(inside[-1])) if inside else sample)
        family.samples.extend(islice(samples, 2))


def _exemplar(exemplar: Any) -> Exemplar:
    labels = {}
    if exemplar.trace_id is not None:
        labels = {"trace_id": format_trace_id(exemplar.trace_id), "span_id": format_span_id(exemplar.span_id)}
    return Exemplar(labels, exemplar.value, exemplar.time_unix_nano * 1e-9)
