"""Where metrics go, as the standard variables say: planned without OpenTelemetry's SDK, which makes the readers."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final, NamedTuple

from otel_npu.standard import bad_value

if TYPE_CHECKING:
    from collections.abc import Mapping

EXPORTER: Final = "OTEL_METRICS_EXPORTER"
EXEMPLAR_FILTER: Final = "OTEL_METRICS_EXEMPLAR_FILTER"
TEMPORALITY: Final = "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE"
AGGREGATION: Final = "OTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION"
HOST: Final = "OTEL_EXPORTER_PROMETHEUS_HOST"
PORT: Final = "OTEL_EXPORTER_PROMETHEUS_PORT"
_ENDPOINTS: Final = ("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
OTLP: Final = {"otlp": "", "otlp_proto_grpc": "grpc", "otlp_proto_http": "http/protobuf"}
_CHECKED: Final = (EXEMPLAR_FILTER, "OTEL_METRIC_EXPORT_INTERVAL", "OTEL_METRIC_EXPORT_TIMEOUT")
_CHECKED_FOR: Final = {**dict.fromkeys(OTLP, (TEMPORALITY, AGGREGATION)), "prometheus": (PORT,)}
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
        if name in OTLP:
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


def _names(environment: Mapping[str, str]) -> list[str]:
    names = environment.get(EXPORTER, "").strip()
    if not names:
        names = "otlp" if any(environment.get(variable, "").strip() for variable in _ENDPOINTS) else "none"
    return [name for name in (name.strip() for name in names.split(",")) if name not in ("", "none")]


def _check(variable: str, environment: Mapping[str, str]) -> None:
    value = environment.get(variable, "").strip()
    bad = bad_value(variable, value) if value else None
    if bad is not None:
        raise ReaderError(str(bad))
