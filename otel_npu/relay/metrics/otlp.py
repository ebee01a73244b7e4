"""Metrics over OTLP: encoded by the SDK, sent as spans are."""

from __future__ import annotations

import logging
import os
import threading
import time
from typing import TYPE_CHECKING, Any, Final

from opentelemetry.exporter.otlp.proto.common.metrics_encoder import encode_metrics
from opentelemetry.sdk import metrics as sdk
from opentelemetry.sdk.metrics.export import AggregationTemporality, MetricExporter, MetricExportResult, MetricsData

from otel_npu.relay.otlp import otlp_exporter
from otel_npu.relay.otlp_settings import METRICS, OtlpSettings
from otel_npu.relay.outcomes import Later, Never, Taken

if TYPE_CHECKING:
    from collections.abc import Mapping

    from otel_npu.relay.metrics.plans import Plan

_log = logging.getLogger("otel_npu.relay")

_FIRST_WAIT_SECONDS: Final = 1.0


class OtlpMetrics(MetricExporter):
    """Sends metrics to one receiver. What it can't be given for now is tried again for as long as a request may take.

    Args:
        plan: What it is to send.
        protocol: The one that the exporter's name fixes; empty if the variables say it.
        environment: The standard variables.

    Raises:
        ExportError: A variable without which nothing can be sent holds what it does not take.
    """

    def __init__(self, plan: Plan, protocol: str = "", environment: Mapping[str, str] = os.environ) -> None:
        temporality = AggregationTemporality.DELTA if plan.delta else AggregationTemporality.CUMULATIVE
        super().__init__(preferred_temporality={sdk.Counter: temporality, sdk.Histogram: temporality})
        self._settings = OtlpSettings.from_environment(protocol, environment, METRICS)
        self._transport = otlp_exporter(self._settings)
        # What takes spans alone, such as Jaeger, need take nothing that nobody has asked for.
        self._refusal_level = logging.WARNING if plan.asked else logging.INFO
        self._ending = threading.Event()
        self._failing = False

    def export(
        self,
        metrics_data: MetricsData,
        timeout_millis: float = 10_000,
        **kwargs: Any,  # noqa: ARG002
    ) -> MetricExportResult:
        """Send these."""
        body = encode_metrics(metrics_data).SerializeToString()
        seconds = min(self._settings.timeout_seconds, timeout_millis / 1000)
        deadline, wait_seconds = time.monotonic() + seconds, _FIRST_WAIT_SECONDS
        outcome = self._transport.send(body, seconds)
        while isinstance(outcome, Later):
            wait_seconds = outcome.after_seconds or wait_seconds * 2
            if time.monotonic() + wait_seconds > deadline or self._ending.wait(wait_seconds):
                break
            outcome = self._transport.send(body, deadline - time.monotonic())
        if isinstance(outcome, Taken):
            if self._failing:
                _log.warning("metrics are exported to %s again", self._settings.shown)
            self._failing = False
            return MetricExportResult.SUCCESS
        if not self._failing:  # once, not once a minute
            level = self._refusal_level if isinstance(outcome, Never) else logging.WARNING
            _log.log(level, "metrics can't be exported to %s: %s", self._settings.shown, outcome.error)
        self._failing = True
        return MetricExportResult.FAILURE

    def force_flush(self, timeout_millis: float = 10_000) -> bool:  # noqa: ARG002
        """Nothing is held back."""
        return True

    def shutdown(self, timeout_millis: float = 30_000, **kwargs: Any) -> None:  # noqa: ARG002
        """Let go of the connection."""
        self._ending.set()
        self._transport.shutdown()
