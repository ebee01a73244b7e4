"""What `import otel_npu` gives, and what it does not bring in."""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Any

import pytest

import otel_npu

if TYPE_CHECKING:
    from collections.abc import Callable

SURFACE = {
    "ProfileExecuteDuration",
    "Settings",
    "SettingsError",
    "__version__",
    "disable",
    "enable",
    "flush",
    "stage",
    "step",
}
HEAVY = ("torch", "torch_npu", "opentelemetry", "grpc", "google.protobuf", "numpy", "vllm")


def test_the_surface_is_exactly_this() -> None:
    assert set(otel_npu.__all__) == set(dir(otel_npu)) == SURFACE
    assert otel_npu.__all__ == sorted(otel_npu.__all__)


def test_every_name_is_there() -> None:
    namespace: dict[str, Any] = {}
    exec("from otel_npu import *", namespace)
    assert set(namespace) - {"__builtins__"} == SURFACE
    assert all(getattr(otel_npu, name) is namespace[name] for name in SURFACE)
    assert not any(isinstance(namespace[name], types.ModuleType) for name in SURFACE)


def test_no_other_name_is() -> None:
    with pytest.raises(AttributeError, match="module 'otel_npu' has no attribute 'trace'"):
        otel_npu.trace  # type: ignore[attr-defined]  # noqa: B018


def test_every_name_says_what_it_is_for() -> None:
    assert all(getattr(otel_npu, name).__doc__ for name in SURFACE)


def test_importing_it_brings_in_nothing_heavy(run_program: Callable[..., Any]) -> None:
    run_program(
        f"""
        import sys
        import otel_npu
        assert not [name for name in {HEAVY} if name in sys.modules]
        assert "otel_npu.capture.switch" in sys.modules  # a child forked meanwhile could not import it any more
        """
    )


def test_while_off_nothing_heavy_comes_with_use_either(run_program: Callable[..., Any]) -> None:
    run_program(
        """
        import sys
        import otel_npu
        with otel_npu.step(), otel_npu.stage("forward"):
            pass
        heavy = ("torch", "opentelemetry.sdk", "opentelemetry.trace", "grpc", "google.protobuf", "numpy")
        assert not [name for name in heavy if name in sys.modules]
        """
    )


def test_the_hot_half_runs_without_the_opentelemetry_sdk_and_without_torch(run_program: Callable[..., Any]) -> None:
    done = run_program(
        """
        import sys
        import otel_npu
        assert otel_npu.enable()
        for _ in range(10):
            with otel_npu.step("decode", requests=["00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"]):
                with otel_npu.stage("forward", layer=1):
                    pass
        with otel_npu.ProfileExecuteDuration().capture_async("forward"):
            pass
        otel_npu.ProfileExecuteDuration().pop_captured_sync()
        print(otel_npu.flush(20))
        otel_npu.disable()
        heavy = ("opentelemetry", "torch", "grpc", "google.protobuf", "numpy")
        assert not [name for name in sys.modules if name.startswith(heavy)], sys.modules
        """,
        {"OTEL_NPU_DEVICE": "simulated", "OTEL_TRACES_EXPORTER": "none"},
    )
    assert done.stdout == "True\n"
