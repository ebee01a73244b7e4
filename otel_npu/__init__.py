"""OpenTelemetry spans with device-measured durations for inference on Ascend NPUs.

    import otel_npu

    with otel_npu.step("decode"):
        with otel_npu.stage("forward"):
            model(tokens)

Off unless `OTEL_NPU_ENABLED=1` is set or `enable()` is called. Importing this brings in neither torch nor the
OpenTelemetry SDK. It brings in all that a stage needs: a process that forks while another thread uses its first stage
would hand an import in progress to its child, where nobody finishes it.
"""

from __future__ import annotations

from otel_npu import compiled
from otel_npu._version import __version__
from otel_npu.capture.durations import ProfileExecuteDuration
from otel_npu.capture.switch import disable, enable, flush, stage, step
from otel_npu.settings import Settings, SettingsError

__all__ = [
    "ProfileExecuteDuration",
    "Settings",
    "SettingsError",
    "__version__",
    "disable",
    "enable",
    "flush",
    "stage",
    "step",
]

compiled.install()


def __dir__() -> list[str]:
    return sorted(__all__)
