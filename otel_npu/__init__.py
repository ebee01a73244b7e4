"""OpenTelemetry spans with device-measured durations for inference on Ascend NPUs.

    import otel_npu

    with otel_npu.step("decode"):
        with otel_npu.stage("forward"):
            model(tokens)

Off unless `OTEL_NPU_ENABLED=1` is set or `enable()` is called. Importing this brings in neither torch nor the
OpenTelemetry SDK: each name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from otel_npu import loading
from otel_npu._version import __version__

if TYPE_CHECKING:
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

_HOMES = {
    "ProfileExecuteDuration": "otel_npu.capture.durations",
    "Settings": "otel_npu.settings",
    "SettingsError": "otel_npu.settings",
    "disable": "otel_npu.capture.switch",
    "enable": "otel_npu.capture.switch",
    "flush": "otel_npu.capture.switch",
    "stage": "otel_npu.capture.switch",
    "step": "otel_npu.capture.switch",
}


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with loading.lock:
        value = globals()[name] = getattr(importlib.import_module(home), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
