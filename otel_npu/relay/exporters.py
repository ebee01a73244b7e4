"""The exporters that the environment names."""

from __future__ import annotations

import os
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Final

from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from otel_npu.relay.otlp import otlp_exporter
from otel_npu.relay.otlp_settings import GRPC, HTTP, ExportError, OtlpSettings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from opentelemetry.sdk.trace import ReadableSpan

_GROUP: Final = "opentelemetry_traces_exporter"
_OTLP: Final = {"otlp": "", "otlp_proto_grpc": GRPC, "otlp_proto_http": HTTP}


def exporters_from_environment(environment: Mapping[str, str] = os.environ) -> list[SpanExporter]:
    """The exporters that `OTEL_TRACES_EXPORTER` names: `otlp` unless it says otherwise, none for `none`.

    Raises:
        ExportError: It names an exporter that is not there, or a variable of OTLP is bad.
    """
    names = environment.get("OTEL_TRACES_EXPORTER", "").strip() or "otlp"
    exporters: list[SpanExporter] = []
    for name in filter(None, (name.strip() for name in names.split(","))):
        if name == "none":
            continue
        if name in _OTLP:
            exporters.append(otlp_exporter(OtlpSettings.from_environment(_OTLP[name], environment)))
            continue
        found = next(iter(entry_points(group=_GROUP, name=name)), None)
        if found is None:
            installed = sorted({point.name for point in entry_points(group=_GROUP)} | {"none"})
            raise ExportError(f"OTEL_TRACES_EXPORTER={names!r}: takes {', '.join(installed)}; not {name!r}")
        exporters.append(found.load()())
    return exporters


class Nowhere(SpanExporter):
    """In the place of an exporter that could not be made: what it gets is lost, and counted."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:  # noqa: ARG002  they go nowhere
        """Fail."""
        return SpanExportResult.FAILURE
