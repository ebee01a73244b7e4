"""The readers that take what was counted: OpenTelemetry's own, with its exporters."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final

from otel_npu.relay.metrics.plans import EXPORTER, HOST, OTLP, PORT, Plan, ReaderError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from opentelemetry.sdk.metrics.export import MetricReader

_GROUP: Final = "opentelemetry_metrics_exporter"


def reader(plan: Plan, environment: Mapping[str, str] = os.environ) -> MetricReader:
    """The reader of a plan.

    Raises:
        ReaderError: Its exporter is not there.
        ExportError: A variable without which nothing can be sent over OTLP has a bad value.
    """
    from opentelemetry.sdk.metrics.export import MetricExporter, PeriodicExportingMetricReader

    if plan.name == "prometheus":
        return _prometheus(environment)
    if plan.name in OTLP:
        from otel_npu.relay.metrics.otlp import OtlpMetrics

        return PeriodicExportingMetricReader(OtlpMetrics(plan, OTLP[plan.name], environment))
    from importlib.metadata import entry_points  # late: it takes longer than all else here

    found = next(iter(entry_points(group=_GROUP, name=plan.name)), None)
    if found is None:
        installed = sorted({point.name for point in entry_points(group=_GROUP)} | {"none", "otlp", "prometheus"})
        raise ReaderError(f"{EXPORTER}={environment[EXPORTER]!r}: takes {', '.join(installed)}; not {plan.name!r}")
    make: Callable[[], Any] = found.load()
    made = make()
    return PeriodicExportingMetricReader(made) if isinstance(made, MetricExporter) else made


def _prometheus(environment: Mapping[str, str]) -> MetricReader:
    try:
        from otel_npu.relay.metrics import prometheus
    except ImportError:
        raise ReaderError(
            f"{EXPORTER}='prometheus': its exporter is not installed: pip install 'otel-npu[prometheus]'"
        ) from None
    return prometheus.Scraped(
        environment.get(HOST, "").strip() or prometheus.DEFAULT_HOST,
        int(environment.get(PORT, "").strip() or prometheus.DEFAULT_PORT),
    )
