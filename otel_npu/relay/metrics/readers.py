"""Where metrics go: the readers and exporters that the standard variables name. Planned without OpenTelemetry's SDK."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from otel_npu.standard import bad_value

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from opentelemetry.sdk.metrics.export import MetricReader

EXPORTER: Final = "OTEL_METRICS_EXPORTER"
EXEMPLAR_FILTER: Final = "OTEL_METRICS_EXEMPLAR_FILTER"
TEMPORALITY: Final = "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE"
AGGREGATION: Final = "OTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION"
HOST: Final = "OTEL_EXPORTER_PROMETHEUS_HOST"
PORT: Final = "OTEL_EXPORTER_PROMETHEUS_PORT"
_ENDPOINTS: Final = ("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_GROUP: Final = "opentelemetry_metrics_exporter"
_OTLP: Final = {"otlp": "", "otlp_proto_grpc": "grpc", "otlp_proto_http": "http/protobuf"}
_CHECKED: Final = (EXEMPLAR_FILTER, "OTEL_METRIC_EXPORT_INTERVAL", "OTEL_METRIC_EXPORT_TIMEOUT")
_CHECKED_FOR: Final = {**dict.fromkeys(_OTLP, (TEMPORALITY, AGGREGATION)), "prometheus": (PORT,)}
# The most buckets and the finest scale that OpenTelemetry's SDK chooses.
_EXPONENTIAL: Final = (160, 20)


class ReaderError(ValueError):
    """A standard variable that says where metrics go holds what it does not take, or names what isn't installed."""


class Plan(NamedTuple):
    """What a reader is to get.

    Attributes:
        name: As `OTEL_METRICS_EXPORTER` has it.
        delta: Whether counts are those since the last time, and not since the beginning.
        exponential: The most buckets and the finest scale of exponential histograms; None for explicit bounds.
        asked: Whether a variable asks for metrics; else they go to an endpoint that may be one for spans alone.
    """

    name: str = ""
    delta: bool = False
    exponential: tuple[int, int] | None = None
    asked: bool = True


def plans_from_environment(environment: Mapping[str, str] = os.environ) -> list[Plan]:
    """What `OTEL_METRICS_EXPORTER` names. If it is unset: OTLP where an endpoint takes metrics, else nothing.

    Whoever names an endpoint for traces alone may have a backend that takes no metrics.

    Raises:
        ReaderError: A variable has a bad value.
    """
    names = _names(environment)
    for variable in _CHECKED if names else ():
        _check(variable, environment)
    plans = []
    for name in dict.fromkeys(names):
        for variable in _CHECKED_FOR.get(name, ()):
            _check(variable, environment)
        if name in _OTLP:
            delta = environment.get(TEMPORALITY, "").strip().lower() in ("delta", "lowmemory")
            exponential = environment.get(AGGREGATION, "").strip().lower() == "base2_exponential_bucket_histogram"
            asked = any(environment.get(variable, "").strip() for variable in (EXPORTER, _ENDPOINTS[0]))
            plans.append(Plan(name, delta, _EXPONENTIAL if exponential else None, asked))
        else:
            plans.append(Plan(name))
    return plans


def exemplar_filter(environment: Mapping[str, str] = os.environ) -> str:
    """Which values may be exemplars: `trace_based` (those of kept steps), `always_on` or `always_off`."""
    return environment.get(EXEMPLAR_FILTER, "").strip().lower() or "trace_based"


def reader(plan: Plan, environment: Mapping[str, str] = os.environ) -> MetricReader:
    """The reader of a plan.

    Raises:
        ReaderError: Its exporter is not there.
        ExportError: A variable without which nothing can be sent over OTLP has a bad value.
    """
    from opentelemetry.sdk.metrics.export import MetricExporter, PeriodicExportingMetricReader

    if plan.name == "prometheus":
        return _prometheus(environment)
    if plan.name in _OTLP:
        from otel_npu.relay.metrics.otlp import OtlpMetrics

        return PeriodicExportingMetricReader(OtlpMetrics(plan, _OTLP[plan.name], environment))
    from importlib.metadata import entry_points  # late: it takes longer than all else here

    found = next(iter(entry_points(group=_GROUP, name=plan.name)), None)
    if found is None:
        installed = sorted({point.name for point in entry_points(group=_GROUP)} | {"none", "otlp", "prometheus"})
        raise ReaderError(f"{EXPORTER}={environment[EXPORTER]!r}: takes {', '.join(installed)}; not {plan.name!r}")
    make: Callable[[], Any] = found.load()
    made = make()
    return PeriodicExportingMetricReader(made) if isinstance(made, MetricExporter) else made


def _names(environment: Mapping[str, str]) -> list[str]:
    names = environment.get(EXPORTER, "").strip()
    if not names:
        names = "otlp" if any(environment.get(variable, "").strip() for variable in _ENDPOINTS) else "none"
    return [name for name in (name.strip() for name in names.split(",")) if name not in ("", "none")]


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


def _check(variable: str, environment: Mapping[str, str]) -> None:
    value = environment.get(variable, "").strip()
    bad = bad_value(variable, value) if value else None
    if bad is not None:
        raise ReaderError(str(bad))
