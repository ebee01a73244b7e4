"""`python -m deploy.dashboards`: Grafana's dashboards and Prometheus's alerts, written anew from here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from grafana_foundation_sdk.builders import common, dashboard, heatmap, prometheus, table, tempo, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as common_model
from grafana_foundation_sdk.models import dashboard as model
from grafana_foundation_sdk.models import heatmap as heatmap_model

from otel_npu import semconv

if TYPE_CHECKING:
    from otel_npu.semconv import Metric

FOLDER: Final = Path(__file__).parent / "compose"
_PROMETHEUS: Final = model.DataSourceRef(type_val="prometheus", uid="prometheus")
_TEMPO: Final = model.DataSourceRef(type_val="tempo", uid="tempo")
_OF: Final = '{job=~"$job", npu_step_kind=~"$kind"}'
_OF_JOB: Final = '{job=~"$job"}'


def name(metric: Metric) -> str:
    """What Prometheus calls a metric; of a histogram without what its parts end with."""
    unit = {"s": "_seconds", "By": "_bytes"}.get(metric.unit, "")
    return metric.name.replace(".", "_") + unit + ("_total" if metric.kind == semconv.COUNTER else "")


def quantile(share: float, metric: Metric, by: str, of: str = _OF) -> str:
    """A quantile of a histogram."""
    return f"histogram_quantile({share}, sum by (le, {by}) (rate({name(metric)}_bucket{of}[$__rate_interval])))"


def rate(metric: Metric, by: str, of: str = _OF, part: str = "") -> str:
    """How much of a counter, or of a histogram's `_sum` or `_count`, a second."""
    return f"sum by ({by}) (rate({name(metric)}{part}{of}[$__rate_interval]))"


def mean(metric: Metric, by: str, of: str = _OF) -> str:
    """The mean of a histogram."""
    return f"{rate(metric, by, of, '_sum')} / {rate(metric, by, of, '_count')}"


def stages() -> dict[str, Any]:
    """*NPU stages*: where the steps' time goes, who is late, and what was left out."""
    steps = f"{name(semconv.ENGINE_STEP_TOKENS)}_count{_OF_JOB}"
    board = (
        _board("NPU stages", "npu-stages")
        .with_variable(_variable("job", "Service", f"label_values({name(semconv.STEPS_RESOLVED)}, job)"))
        .with_variable(
            _variable(
                "kind",
                "Kind of step",
                f'label_values({name(semconv.STEP_DURATION)}_count{{job=~"$job"}}, npu_step_kind)',
            )
        )
    )
    board = board.with_row(dashboard.Row("Stages"))
    for title, share in (("median", 0.5), ("99 of 100", 0.99)):
        board = board.with_panel(
            _lines(
                f"Stage duration, {title}",
                "s",
                (quantile(share, semconv.STAGE_DURATION, "npu_stage_name"), "{{npu_stage_name}}"),
            )
        )
    board = (
        board.with_panel(_heat("Stage duration, and steps that were kept", semconv.STAGE_DURATION))
        .with_panel(
            _lines(
                "Step duration, median and 99 of 100",
                "s",
                (quantile(0.5, semconv.STEP_DURATION, "npu_step_kind"), "{{npu_step_kind}} median"),
                (quantile(0.99, semconv.STEP_DURATION, "npu_step_kind"), "{{npu_step_kind}} 99 of 100"),
            )
        )
        .with_row(dashboard.Row("Host or device"))
        .with_panel(
            _lines(
                "Launch-bound: the host's time to launch a stage, as a share of the stage (1: launch-bound)",
                "percentunit",
                (
                    f"{rate(semconv.STAGE_HOST_TIME, 'npu_stage_name')} / "
                    + rate(
                        semconv.STAGE_DURATION,
                        "npu_stage_name",
                        '{job=~"$job", npu_step_kind=~"$kind", npu_timing="device"}',
                        "_sum",
                    ),
                    "{{npu_stage_name}}",
                ),
            )
        )
        .with_panel(
            _lines(
                "Device-bound: from a stage's enqueueing to its start, 99 of 100",
                "s",
                (quantile(0.99, semconv.STAGE_ENQUEUE_DELAY, "npu_stage_name"), "{{npu_stage_name}}"),
            )
        )
        .with_panel(_lines("Idle between steps, mean", "s", (mean(semconv.IDLE, "npu_rank"), "rank {{npu_rank}}")))
        .with_panel(
            _lines(
                "Busy with steps",
                "percentunit",
                (
                    rate(semconv.DEVICE_STEP_TIME, "npu_rank, npu_device_index", _OF_JOB),
                    "rank {{npu_rank}} device {{npu_device_index}}",
                ),
            )
        )
        .with_row(dashboard.Row("Ranks"))
        .with_panel(
            _lines(
                "Skew of the last rank, 99 of 100",
                "s",
                (quantile(0.99, semconv.SKEW, "npu_step_kind"), "{{npu_step_kind}}"),
            )
        )
        .with_panel(
            _lines(
                "Steps in which the others waited for a rank, of all",
                "percentunit",
                (
                    f"{rate(semconv.STRAGGLES, 'npu_rank', _OF_JOB)} / scalar(sum(rate({steps}[$__rate_interval])))",
                    "rank {{npu_rank}}",
                ),
            )
        )
        .with_row(dashboard.Row("Load"))
        .with_panel(
            _lines("Steps a second", "short", (rate(semconv.STEPS_RESOLVED, "npu_rank", _OF_JOB), "rank {{npu_rank}}"))
        )
        .with_panel(
            _lines(
                "Tokens a step, mean", "short", (mean(semconv.ENGINE_STEP_TOKENS, "npu_step_kind"), "{{npu_step_kind}}")
            )
        )
        .with_panel(
            _lines(
                "Steps kept as traces, a second",
                "short",
                (rate(semconv.STEPS_KEPT, "npu_sampled_reason", _OF_JOB), "{{npu_sampled_reason}}"),
            )
        )
        .with_panel(_slow_steps())
        .with_row(dashboard.Row("What was left out, and the relay"))
        .with_panel(
            _lines("Drops, a second", "short", (rate(semconv.DROPS, "npu_drop_reason", _OF_JOB), "{{npu_drop_reason}}"))
        )
        .with_panel(
            _lines(
                "Clock uncertainty",
                "s",
                (f"max by (npu_rank) ({name(semconv.UNCERTAINTY)}{_OF_JOB})", "rank {{npu_rank}}"),
            )
        )
        .with_panel(
            _lines(
                "The relay: processor, and queue fill",
                "percentunit",
                (rate(semconv.RELAY_CPU, "instance", _OF_JOB), "processor {{instance}}"),
                (
                    f"max by (instance) ({name(semconv.QUEUE_SIZE)}{_OF_JOB} / {name(semconv.QUEUE_LIMIT)}{_OF_JOB})",
                    "queue {{instance}}",
                ),
            )
        )
        .with_panel(
            _lines(
                "The relay: memory",
                "bytes",
                (f"max by (instance) ({name(semconv.RELAY_MEMORY)}{_OF_JOB})", "{{instance}}"),
            )
        )
    )
    return _plain(board)


def one_request() -> dict[str, Any]:
    """*One request*: the traces of a request by the id that its client got, and how it compares with the others."""
    board = (
        _board("One request", "npu-one-request")
        .with_variable(dashboard.TextBoxVariable("request").label("Request id"))
        .with_variable(_variable("job", "Service", f"label_values({name(semconv.STEPS_RESOLVED)}, job)"))
        .with_panel(
            _traces(
                "Its traces: open one for queue, prefill and decode",
                f'{{ span.{semconv.REQUEST_ID} = "$request" || span.{semconv.RESPONSE_ID} = "$request" }}',
            )
        )
        .with_panel(
            _traces(
                "Slow requests beside it",
                '{ name = "llm_request" && duration > 5s }',
            )
        )
        .with_panel(
            _lines(
                "Device time of a request, and its share of it, median",
                "s",
                (
                    quantile(0.5, semconv.REQUEST_TIME, "npu_request_finish_reason", _OF_JOB),
                    "all {{npu_request_finish_reason}}",
                ),
                (
                    quantile(0.5, semconv.REQUEST_ATTRIBUTED_TIME, "npu_request_finish_reason", _OF_JOB),
                    "share {{npu_request_finish_reason}}",
                ),
            )
        )
        .with_panel(_heat("Device time of requests", semconv.REQUEST_TIME, _OF_JOB))
    )
    return _plain(board)


def alerts() -> dict[str, Any]:
    """Alerting rules, as Prometheus reads them: JSON is YAML too."""
    stage, drops = name(semconv.STAGE_DURATION), name(semconv.DROPS)
    hangs, hung = name(semconv.HANGS), "job, npu_stage_name, npu_rank"
    p99 = f"histogram_quantile(0.99, sum by (le, job, npu_stage_name, npu_step_kind) (rate({stage}_bucket"
    steps = f"sum by (job) (rate({name(semconv.ENGINE_STEP_TOKENS)}_count[10m]))"
    rules = [
        _rule(
            "NpuStageSlower",
            f"{p99}[10m]))) > 2 * {p99}[10m] offset 1d)))",
            "10m",
            "warning",
            "Stage {{ $labels.npu_stage_name }} of {{ $labels.npu_step_kind }} steps takes twice as long as a day ago.",
        ),
        _rule(
            "NpuRankStraggles",
            f"sum by (job, npu_rank) (rate({name(semconv.STRAGGLES)}[10m])) > on (job) group_left () (0.5 * {steps})",
            "10m",
            "warning",
            "In most steps the other ranks wait for rank {{ $labels.npu_rank }}.",
        ),
        _rule(
            "NpuTracingDrops",
            # The first of a kind is no increase to Prometheus: the series begins with it.
            f"sum by (job, npu_drop_reason) (increase({drops}[10m])) > 0"
            f" or sum by (job, npu_drop_reason) ({drops} unless {drops} offset 10m) > 0",
            "5m",
            "warning",
            "Something is left out of traces or metrics: {{ $labels.npu_drop_reason }}.",
        ),
        _rule(
            "NpuStageHangs",
            f"sum by ({hung}) (increase({hangs}[5m])) > 0 or sum by ({hung}) ({hangs} unless {hangs} offset 5m) > 0",
            "0m",
            "critical",
            "Stage {{ $labels.npu_stage_name }} of rank {{ $labels.npu_rank }} hangs.",
        ),
        _rule(
            "NpuRelayGone",
            f"{name(semconv.RELAY_MEMORY)} offset 10m unless on (job) {name(semconv.RELAY_MEMORY)}",
            "2m",
            "critical",
            "No relay of {{ $labels.job }} has told anything for a while: no traces, no metrics.",
        ),
    ]
    return {"groups": [{"name": "otel-npu", "rules": rules}]}


def _rule(alert: str, expression: str, after: str, severity: str, summary: str) -> dict[str, Any]:
    return {
        "alert": alert,
        "expr": expression,
        "for": after,
        "labels": {"severity": severity},
        "annotations": {"summary": summary},
    }


def _board(title: str, uid: str) -> dashboard.Dashboard:
    return (
        dashboard.Dashboard(title)
        .uid(uid)
        .tags(["otel-npu"])
        .editable()
        .refresh("30s")
        .time("now-1h", "now")
        .tooltip(model.DashboardCursorSync.CROSSHAIR)
    )


def _variable(variable: str, label: str, query: str) -> dashboard.QueryVariable:
    return (
        dashboard.QueryVariable(variable)
        .label(label)
        .datasource(_PROMETHEUS)
        .query(query)
        .refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .include_all(True)
        .all_value(".*")
        .multi(True)
    )


def _lines(title: str, unit: str, *queries: tuple[str, str]) -> timeseries.Panel:
    panel = (
        timeseries.Panel()
        .title(title)
        .datasource(_PROMETHEUS)
        .unit(unit)
        .min(0)
        .height(8)
        .span(12)
        .fill_opacity(5)
        .show_points(common_model.VisibilityMode.NEVER)
        .legend(common.VizLegendOptions().display_mode(common_model.LegendDisplayMode.LIST).show_legend(True))
    )
    for index, (expression, legend) in enumerate(queries):
        panel = panel.with_target(
            prometheus.Dataquery().ref_id(chr(65 + index)).expr(expression).legend_format(legend).exemplar(True)
        )
    return panel


def _heat(title: str, metric: Metric, of: str = _OF) -> heatmap.Panel:
    return (
        heatmap.Panel()
        .title(title)
        .datasource(_PROMETHEUS)
        .height(8)
        .span(12)
        .calculate(False)
        .y_axis(heatmap.YAxisConfig().unit("s"))
        .cell_values(heatmap.CellValues().unit("short"))
        .exemplars_color(heatmap_model.ExemplarConfig(color="rgba(255,0,255,0.7)"))
        .with_target(
            prometheus.Dataquery()
            .ref_id("A")
            .expr(f"sum by (le) (increase({name(metric)}_bucket{of}[$__rate_interval]))")
            .format("heatmap")
            .legend_format("{{le}}")
            .exemplar(True)
        )
    )


def _slow_steps() -> table.Panel:
    return _traces(
        "Slow steps", f'{{ name = "{semconv.ENGINE_STEP}" && span.{semconv.SAMPLED_REASON} = "{semconv.SLOW}" }}'
    ).span(12)


def _traces(title: str, query: str) -> table.Panel:
    return (
        table.Panel()
        .title(title)
        .datasource(_TEMPO)
        .height(8)
        .span(24)
        .with_target(tempo.TempoQuery().ref_id("A").query_type("traceql").query(query).limit(20))
    )


def _plain(board: dashboard.Dashboard) -> dict[str, Any]:
    return dict(json.loads(JSONEncoder(sort_keys=True).encode(board.build())))


FILES: Final = {
    "grafana/dashboards/npu-stages.json": stages,
    "grafana/dashboards/one-request.json": one_request,
    "prometheus/alerts.json": alerts,
}


def text(content: dict[str, Any]) -> str:
    """As it lies in its file."""
    return json.dumps(content, indent=1, sort_keys=True) + "\n"


if __name__ == "__main__":
    for path, make in FILES.items():
        (FOLDER / path).parent.mkdir(parents=True, exist_ok=True)
        (FOLDER / path).write_text(text(make()))
