"""Metrics leave over OTLP, as the standard variables say: to the receiver, and through a real collector."""

from __future__ import annotations

import itertools
from concurrent import futures
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from opentelemetry.sdk.metrics.export import MetricExportResult, MetricsData

from otel_npu.relay.metrics.otlp import OtlpMetrics
from otel_npu.relay.metrics.plans import plans_from_environment
from tests.helpers.collector import Collector
from tests.helpers.traced import Programs

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.helpers.receiver import Point, Receiver

DELTA, CUMULATIVE = 1, 2


@pytest.fixture
def programs(tmp_path: Path) -> Iterator[Programs]:
    with Programs(tmp_path) as running:
        yield running


def environment(where: Receiver | Collector, protocol: str = "grpc", **more: str) -> dict[str, str]:
    chosen = where.grpc_environment if protocol == "grpc" else where.http_environment
    return {**chosen, "OTEL_METRIC_EXPORT_INTERVAL": "200", "OTEL_SERVICE_NAME": "llm", **more}


def forward(point: Point) -> bool:
    return point.attributes.get("npu.stage.name") == "forward" and point.count >= 50


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_every_step_is_counted_in_the_service_of_its_program(
    programs: Programs, receiver: Receiver, protocol: str
) -> None:
    worker = programs.start(environment(receiver, protocol))
    worker.ask("steps(50)")
    assert worker.ask("otel_npu.flush(30)")
    point = receiver.wait_for_point("npu.stage.duration", forward)
    assert (point.kind, point.unit, point.temporality, point.count) == ("histogram", "s", CUMULATIVE, 50)
    assert (sum(point.buckets), len(point.buckets)) == (50, 20)
    assert point.attributes == {
        "npu.stage.name": "forward",
        "npu.step.kind": "decode",
        "npu.device.index": 0,
        "npu.timing": "device",
    }
    assert point.resource["service.name"] == "llm"
    assert "process.pid" not in point.resource
    spans = receiver.named("forward")
    assert point.value == pytest.approx(sum(span.duration_ns for span in spans) * 1e-9, rel=1e-6)
    ids = {(span.trace_id, span.span_id) for span in spans}
    exemplars = [each for told in receiver.points("npu.stage.duration") for each in told.exemplars]
    assert exemplars
    assert {(trace_id, span_id) for trace_id, span_id, _ in exemplars} <= ids
    for metric in ("npu.relay.cpu.time", "npu.relay.queue.limit", "npu.steps.captured", "npu.resolver.lag"):
        assert receiver.wait_for_point(metric).resource == point.resource


def test_a_relay_says_how_it_was_when_it_ends(programs: Programs, receiver: Receiver) -> None:
    worker = programs.start(environment(receiver, OTEL_METRIC_EXPORT_INTERVAL="3600000"))
    worker.ask("steps(50)")
    worker.leave()
    assert receiver.wait_for_point("npu.stage.duration", forward).count == 50
    exported = receiver.wait_for_point("npu.relay.spans.exported", lambda point: point.value > 0)
    assert exported.value == len(receiver.spans) == 100


def test_temporality_and_kind_of_histogram_are_those_of_the_standard_variables(
    programs: Programs, receiver: Receiver
) -> None:
    worker = programs.start(
        environment(
            receiver,
            OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE="delta",
            OTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION="base2_exponential_bucket_histogram",
            OTEL_METRICS_EXEMPLAR_FILTER="always_off",
        )
    )
    for _ in range(2):
        before = sum(point.count for point in receiver.points("npu.stage.duration"))
        worker.ask("steps(50)")
        assert worker.ask("otel_npu.flush(30)")
        receiver.wait_for_point(
            "npu.stage.duration",
            lambda _, before=before: (  # type: ignore[misc]
                sum(point.count for point in receiver._points if point.metric == "npu.stage.duration") == before + 50
            ),
        )
    points = receiver.points("npu.stage.duration")
    assert {(point.kind, point.temporality) for point in points} == {("exponential_histogram", DELTA)}
    assert sum(point.count for point in points) == 100
    assert all(sum(point.buckets) == point.count for point in points)
    assert not any(point.exemplars for point in points)
    assert all(former.end_ns <= latter.start_ns for former, latter in itertools.pairwise(points))


def test_through_a_real_collector(programs: Programs, receiver: Receiver) -> None:
    with Collector(receiver) as collector:
        worker = programs.start(environment(collector))
        worker.ask("steps(50)")
        assert worker.ask("otel_npu.flush(30)")
        point = receiver.wait_for_point("npu.stage.duration", forward)
    assert (point.count, point.resource["service.name"]) == (50, "llm")


def test_an_endpoint_for_traces_alone_gets_no_metrics_and_there_is_no_line_about_it(
    programs: Programs, receiver: Receiver
) -> None:
    traces: dict[str, Any] = {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"http://127.0.0.1:{receiver.grpc_port}"}
    worker = programs.start({**traces, "OTEL_METRIC_EXPORT_INTERVAL": "100"})
    worker.ask("steps(50)")
    assert worker.ask("otel_npu.flush(30)")
    worker.leave()
    assert len(receiver.named("forward")) == 50
    assert receiver._points == []
    assert "ERROR" not in programs.log and "WARNING" not in programs.log  # noqa: PT018


@pytest.mark.parametrize(
    ("asked", "lines"),
    [({}, 0), ({"OTEL_METRICS_EXPORTER": "otlp"}, 1), ({"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "{endpoint}"}, 1)],
)
def test_that_a_receiver_takes_spans_alone_is_a_line_where_metrics_were_asked_for(
    asked: dict[str, str], lines: int, caplog: pytest.LogCaptureFixture
) -> None:
    takes_none = grpc.server(futures.ThreadPoolExecutor(1))
    endpoint = f"http://127.0.0.1:{takes_none.add_insecure_port('127.0.0.1:0')}"
    takes_none.start()
    environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint}
    environment |= {name: value.format(endpoint=endpoint) for name, value in asked.items()}
    [plan] = plans_from_environment(environment)
    exporter = OtlpMetrics(plan, environment=environment)
    for _ in range(2):
        assert exporter.export(MetricsData([])) is MetricExportResult.FAILURE
    exporter.shutdown()
    takes_none.stop(None)
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == [
        "UNIMPLEMENTED: Method not found!"
    ] * lines
