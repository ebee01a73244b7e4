"""Dashboards and alerts: in step with what they are made from, and each query answered by the real Prometheus."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from deploy import dashboards
from otel_npu import semconv
from tests.helpers.capturing import capturing
from tests.helpers.fleet import Fleet, Relay
from tests.helpers.prometheus import Prometheus, free_port

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.mark.parametrize("path", dashboards.FILES)
def test_a_file_is_in_step_with_what_it_is_made_from(path: str) -> None:
    text = dashboards.text(dashboards.FILES[path]())
    assert (dashboards.FOLDER / path).read_text() == text, "make it anew: python -m deploy.dashboards"


def test_the_rules_are_prometheus_own() -> None:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed (Debian's package prometheus)")
    done = subprocess.run(
        ["promtool", "check", "rules", str(dashboards.FOLDER / "prometheus/alerts.json")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def queries(content: Any) -> Iterator[str]:
    """Every PromQL expression in a dashboard, with its variables filled in."""
    if isinstance(content, dict):
        expression = content.get("expr")
        if isinstance(expression, str):
            yield expression.replace("$__rate_interval", "1m").replace("$job", ".*").replace("$kind", ".*")
        content = list(content.values())
    if isinstance(content, list):
        for value in content:
            yield from queries(value)


@pytest.fixture(scope="module")
def scraped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """A Prometheus that has scraped a fleet of four ranks twice, and what its relay says of itself."""
    pytest.importorskip("opentelemetry.exporter.prometheus")
    from otel_npu.relay.metrics.plans import Plan
    from otel_npu.relay.metrics.prometheus import Scraped

    port = free_port()
    reader = Scraped("127.0.0.1", port)
    relay = Relay(reader, Plan("prometheus"))
    folder = tmp_path_factory.mktemp("prometheus")
    with (
        capturing(steps_per_second=2) as captured,
        pytest.MonkeyPatch.context() as monkeypatch,
        Prometheus(folder, port, dashboards.FOLDER / "prometheus/alerts.json") as prometheus,
    ):
        fleet = Fleet(captured, monkeypatch, [relay] * 8)
        fleet.run(60)
        relay.finish_requests()
        resolved = "sum(npu_steps_resolved_total)"
        prometheus.eventually(lambda: prometheus.value(resolved) >= 8 * 60, "scraped once")
        fleet.run(60)
        relay.finish_requests()
        relay.drops.add(semconv.QUEUE_FULL)
        prometheus.eventually(lambda: prometheus.value(resolved) >= 8 * 120, "scraped twice")
        prometheus.eventually(
            lambda: prometheus.value("count_over_time(npu_relay_memory_usage_bytes[1m])") > 3, "four times"
        )
        yield prometheus
    reader.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in dashboards.FILES if path.startswith("grafana")])
def test_every_query_returns_something(path: str, scraped: Prometheus) -> None:
    found = list(queries(json.loads((dashboards.FOLDER / path).read_text())))
    assert found
    nothing = [query for query in found if not scraped.query(query)]
    assert nothing == []


def test_every_metric_that_is_asked_for_is_one_of_ours() -> None:
    known = {dashboards.name(metric) for metric in semconv.METRICS}
    texts = [(dashboards.FOLDER / path).read_text() for path in dashboards.FILES]
    asked = {
        re.sub(r"_(bucket|sum|count)$", "", name)
        for text in texts
        for name in re.findall(r"\bnpu_[a-z_]+(?=\{|\[| offset|_bucket)", text)
    }
    assert len(asked) > 12
    assert asked <= known


@pytest.mark.slow
def test_a_drop_and_a_hang_become_alerts(scraped: Prometheus) -> None:
    alerts = {rule["alert"] for group in dashboards.alerts()["groups"] for rule in group["rules"]}
    assert alerts == {"NpuStageSlower", "NpuRankStraggles", "NpuTracingDrops", "NpuStageHangs", "NpuRelayGone"}
    names = scraped.eventually(
        lambda: (
            {alert["labels"]["alertname"] for alert in scraped.alerts()} & {"NpuTracingDrops", "NpuStageHangs"}
            == {"NpuTracingDrops", "NpuStageHangs"}
        ),
        "both are pending or firing",
    )
    assert names


def test_folder_is_the_one_that_compose_mounts() -> None:
    assert (Path("deploy/compose").resolve()) == dashboards.FOLDER.resolve()
