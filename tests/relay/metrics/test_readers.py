"""Where metrics go, by the standard variables: each with one clear line where it holds what it does not take."""

from __future__ import annotations

import socket
import sys
import threading
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from opentelemetry.sdk.metrics.export import MetricReader, PeriodicExportingMetricReader

from otel_npu.drops import Drops
from otel_npu.relay.metrics.counted import Metrics
from otel_npu.relay.metrics.plans import Plan, ReaderError, exemplar_filter, plans_from_environment
from otel_npu.relay.metrics.readers import reader

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

ENDPOINT = "http://127.0.0.1:1"


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Makes readers, and ends them."""
    readers: list[MetricReader] = []

    def make(environment: Mapping[str, str]) -> list[MetricReader]:
        for variable, value in environment.items():
            monkeypatch.setenv(variable, value)
        readers.extend(reader(plan, environment) for plan in plans_from_environment(environment))
        return readers

    yield make
    for one in readers:
        one._set_collect_callback(None)
        one.shutdown(timeout_millis=1000)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": ENDPOINT},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": ENDPOINT, "OTEL_METRICS_EXPORTER": "none"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": " "},
    ],
)
def test_without_an_endpoint_that_takes_metrics_there_are_none(made: Any, environment: dict[str, str]) -> None:
    assert made(environment) == []


@pytest.mark.parametrize(
    ("environment", "exporter"),
    [
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": ENDPOINT}, "GrpcExporter"),
        ({"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": ENDPOINT}, "GrpcExporter"),
        (
            {"OTEL_EXPORTER_OTLP_ENDPOINT": ENDPOINT, "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"},
            "HttpExporter",
        ),
        (
            {
                "OTEL_METRICS_EXPORTER": "otlp",
                "OTEL_EXPORTER_OTLP_METRICS_PROTOCOL": "http/protobuf",
                "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc",
            },
            "HttpExporter",
        ),
        ({"OTEL_METRICS_EXPORTER": "console"}, "ConsoleMetricExporter"),
    ],
)
def test_the_exporter_is_the_one_that_the_variables_name(made: Any, environment: dict[str, str], exporter: str) -> None:
    [one] = made(environment)
    assert isinstance(one, PeriodicExportingMetricReader)
    made_of = getattr(one._exporter, "_transport", one._exporter)
    assert type(made_of).__name__ == exporter


def test_several_are_read_apart(made: Any) -> None:
    assert len(made({"OTEL_METRICS_EXPORTER": "console, prometheus", "OTEL_EXPORTER_PROMETHEUS_PORT": "0"})) == 2


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        ({"OTEL_METRICS_EXPORTER": "statsd"}, "OTEL_METRICS_EXPORTER='statsd': takes "),
        (
            {"OTEL_METRICS_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_METRICS_PROTOCOL": "http/json"},
            "OTEL_EXPORTER_OTLP_METRICS_PROTOCOL='http/json': takes grpc or http/protobuf",
        ),
        (
            {"OTEL_METRICS_EXPORTER": "otlp", "OTEL_METRIC_EXPORT_INTERVAL": "0"},
            "OTEL_METRIC_EXPORT_INTERVAL='0': takes a number of milliseconds above 0",
        ),
        (
            {"OTEL_METRICS_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE": "both"},
            "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE='both': takes cumulative or delta or lowmemory",
        ),
        (
            {"OTEL_METRICS_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION": "fine"},
            "OTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION='fine': takes explicit_bucket_histogram or ",
        ),
        (
            {"OTEL_METRICS_EXPORTER": "prometheus", "OTEL_EXPORTER_PROMETHEUS_PORT": "http"},
            "OTEL_EXPORTER_PROMETHEUS_PORT='http': takes a port, a whole number up to 65535",
        ),
        (
            {"OTEL_METRICS_EXPORTER": "console", "OTEL_METRICS_EXEMPLAR_FILTER": "some"},
            "OTEL_METRICS_EXEMPLAR_FILTER='some': takes trace_based or always_on or always_off",
        ),
    ],
)
def test_a_bad_value_is_one_clear_line_and_no_metrics_are_exported(
    environment: dict[str, str], line: str, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = Metrics.from_environment(Drops(), environment)
    if metrics is not None:
        metrics.load(lambda: (0, 0, 0), environment)
        assert not metrics.shelves
    [record] = caplog.records
    assert record.getMessage().startswith(line)
    assert record.getMessage().endswith("; no metrics are exported")


def test_prometheus_without_its_exporter_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "otel_npu.relay.metrics.prometheus", None)
    monkeypatch.delattr("otel_npu.relay.metrics.prometheus", raising=False)
    with pytest.raises(ReaderError, match=r"its exporter is not installed: pip install 'otel-npu\[prometheus\]'"):
        reader(Plan("prometheus"), {})


def test_a_port_in_use_is_one_clear_line_and_taken_once_it_is_free(
    made: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from otel_npu.relay.metrics import prometheus

    monkeypatch.setattr(prometheus, "_RETRY_SECONDS", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        [one] = made(
            {
                "OTEL_METRICS_EXPORTER": "prometheus",
                "OTEL_EXPORTER_PROMETHEUS_HOST": "127.0.0.1",
                "OTEL_EXPORTER_PROMETHEUS_PORT": str(port),
            }
        )
        [record] = caplog.records
        assert record.getMessage().startswith(f"127.0.0.1:{port} is in use or can't be listened on")
        assert "OTEL_EXPORTER_PROMETHEUS_PORT" in record.getMessage()
        assert one.port == 0
    while one.port != port:
        time.sleep(0.02)
    assert len(caplog.records) == 1


def test_the_exemplar_filter_is_the_standard_one() -> None:
    assert exemplar_filter({}) == "trace_based"
    assert exemplar_filter({"OTEL_METRICS_EXEMPLAR_FILTER": "ALWAYS_OFF"}) == "always_off"


def test_where_no_thread_can_be_started_the_last_export_is_made_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_threads(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    ended: list[float] = []
    metrics = Metrics.__new__(Metrics)
    metrics._sources = [SimpleNamespace(reader=SimpleNamespace(shutdown=ended.append)) for _ in range(2)]  # type: ignore[misc]
    monkeypatch.setattr(threading.Thread, "start", no_threads)
    metrics.close(1.5)
    assert ended == [1500, 1500]
