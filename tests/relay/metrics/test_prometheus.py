"""The real Prometheus scrapes a running relay: counts, times, and exemplars that lead to spans."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.helpers.prometheus import Prometheus, free_port
from tests.helpers.traced import Programs

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.helpers.receiver import Receiver


@pytest.fixture
def programs(tmp_path: Path) -> Iterator[Programs]:
    with Programs(tmp_path) as running:
        yield running


def traces_alone(receiver: Receiver) -> dict[str, str]:
    return {
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"http://127.0.0.1:{receiver.grpc_port}",
        "OTEL_BSP_SCHEDULE_DELAY": "100",
    }


@pytest.mark.slow
def test_prometheus_scrapes_every_step_and_its_exemplars_lead_to_spans(
    programs: Programs, receiver: Receiver, tmp_path: Path
) -> None:
    port = free_port()
    environment = {
        **traces_alone(receiver),
        "OTEL_METRICS_EXPORTER": "prometheus",
        "OTEL_EXPORTER_PROMETHEUS_HOST": "127.0.0.1",
        "OTEL_EXPORTER_PROMETHEUS_PORT": str(port),
        "OTEL_SERVICE_NAME": "llm",
        "OTEL_NPU_STEPS_PER_SECOND": "2",
        "OTEL_NPU_SLOW_STEP": "off",
    }
    worker = programs.start(environment)
    with Prometheus(tmp_path, port) as prometheus:
        worker.ask("steps(500)")
        worker.ask("steps(20, 'prefill')")
        assert worker.ask("otel_npu.flush(30)")
        decode = 'npu_stage_duration_seconds_count{npu_stage_name="forward", npu_step_kind="decode"}'
        prometheus.eventually(lambda: prometheus.value(decode) == 500, "all steps are counted")
        assert prometheus.value("sum(npu_steps_resolved_total)") == 520
        assert prometheus.value("sum(npu_steps_captured_total)") == 520
        [series] = prometheus.query(decode)
        labels = series["metric"]
        assert (labels["service_name"], labels["job"], labels["npu_timing"]) == ("llm", "relay", "device")
        assert "npu_rank" not in labels
        kept = prometheus.value('sum(npu_steps_kept_total{npu_sampled_reason="rate"})')
        spans = receiver.named("worker_step")
        assert kept == len(spans) >= 2
        exemplars: list[dict[str, Any]] = prometheus.eventually(
            lambda: prometheus.exemplars("npu_stage_duration_seconds_bucket"), "exemplars"
        )
        forwards = {(span.trace_id, span.span_id): span.duration_ns * 1e-9 for span in receiver.named("forward")}
        for exemplar in exemplars:
            ids = exemplar["labels"]["trace_id"], exemplar["labels"]["span_id"]
            assert forwards[ids] == pytest.approx(float(exemplar["value"]), abs=2e-9)
        assert 0 < prometheus.value("npu_relay_memory_usage_bytes") < 150e6
        exported = "npu_relay_spans_exported_total"
        prometheus.eventually(lambda: prometheus.value(exported) == len(receiver.spans), "the relay counts its spans")
    worker.leave()
    assert "ERROR" not in programs.log


@pytest.mark.slow
def test_two_relays_that_want_one_port_are_one_clear_line_and_the_second_serves_when_the_first_has_gone(
    tmp_path: Path, receiver: Receiver
) -> None:
    port = free_port()
    environment = {
        **traces_alone(receiver),
        "OTEL_METRICS_EXPORTER": "prometheus",
        "OTEL_EXPORTER_PROMETHEUS_HOST": "127.0.0.1",
        "OTEL_EXPORTER_PROMETHEUS_PORT": str(port),
    }
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    with Programs(folders[0]) as one, Programs(folders[1]) as two:
        first, second = one.start(environment), None
        first.ask("steps(1)")
        assert first.ask("otel_npu.flush(30)")
        second = two.start(environment)
        second.ask("steps(3)")
        assert second.ask("otel_npu.flush(30)")
        line = f"127.0.0.1:{port} is in use or can't be listened on, so Prometheus can't scrape"
        assert two.log.count(line) == 1
        first.leave()
        with Prometheus(tmp_path, port) as prometheus:
            resolved = "sum(npu_steps_resolved_total)"
            prometheus.eventually(lambda: prometheus.value(resolved) == 3, "the second relay is scraped")
