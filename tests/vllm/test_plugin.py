"""The plugin: what it does to a process, and where its relay sends."""

from __future__ import annotations

import logging
import os
import sys
import threading
from typing import TYPE_CHECKING

import pytest

from otel_npu import hooks
from otel_npu.vllm import plugin, tracing

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Iterator

RAY = "VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY"


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What the plugin would install."""
    asked: list[object] = []
    monkeypatch.setattr(hooks, "install", asked.append)
    for variable in (RAY, "OTEL_NPU_SESSION"):
        monkeypatch.setenv(variable, "")  # so that it is as before after the test
    return asked


def test_unless_tracing_is_enabled_nothing_is_touched(installed: list[object]) -> None:
    before = dict(os.environ)
    plugin.register()
    assert not installed
    assert dict(os.environ) == before


def test_enabled_it_installs_the_hooks_and_makes_the_session(
    installed: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_NPU_ENABLED", "1")
    plugin.register()
    assert installed == [plugin.HOOKS]
    assert os.environ["OTEL_NPU_SESSION"]


@pytest.mark.parametrize(
    ("before", "after"), [("", "OTEL_"), ("MY_,OUR_", "MY_,OUR_,OTEL_"), ("MY_, OTEL_", "MY_, OTEL_")]
)
def test_ray_workers_on_other_hosts_get_the_settings(
    installed: list[object], monkeypatch: pytest.MonkeyPatch, before: str, after: str
) -> None:
    monkeypatch.setenv("OTEL_NPU_ENABLED", "1")
    monkeypatch.setenv(RAY, before)
    for _ in range(2):
        plugin.register()
    assert os.environ[RAY] == after


def test_a_bad_setting_is_one_line_and_tracing_stays_off(
    installed: list[object], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_NPU_ENABLED", "1")
    monkeypatch.setenv("OTEL_NPU_STEPS_PER_SECOND", "many")
    plugin.register()
    assert not installed
    (record,) = caplog.records
    assert "OTEL_NPU_STEPS_PER_SECOND='many'" in record.getMessage()


def test_the_plugin_brings_neither_vllm_nor_torch_nor_the_sdk_into_the_process(
    run_program: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    done = run_program(
        """
        import sys
        from otel_npu.vllm.plugin import register
        register()
        register()
        print([name for name in ("vllm", "torch", "opentelemetry.sdk") if name in sys.modules])
        """,
        {"OTEL_NPU_ENABLED": "1"},
    )
    assert done.stdout.strip() == "[]"


def test_vllm_finds_the_plugin() -> None:
    from importlib.metadata import entry_points

    (entry,) = entry_points(group="vllm.general_plugins", name="otel_npu")
    assert entry.load() is plugin.register


# Where the relay sends.


@pytest.mark.parametrize("protocol", [None, "http/protobuf"])
def test_the_flags_endpoint_is_exported_to_as_vllm_does(monkeypatch: pytest.MonkeyPatch, protocol: str | None) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json")  # which vLLM doesn't read
    if protocol:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", protocol)
    assert tracing.exporter_environment("grpc://collector:4317") == {
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "grpc://collector:4317",
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": protocol or "grpc",
        "OTEL_EXPORTER_OTLP_TRACES_INSECURE": "true",
    }


def test_without_the_flag_the_environment_says_where() -> None:
    assert tracing.exporter_environment(None) == {}


def test_who_asked_for_vllm_ascends_log_line_still_gets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ASCEND_MODEL_EXECUTE_TIME_OBSERVE", "1")
    assert tracing.settings().log_stages
    monkeypatch.setenv("OTEL_NPU_LOG_STAGES", "0")
    assert not tracing.settings().log_stages


@pytest.fixture
def unbegun(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a process that has not traced yet."""
    from otel_npu.capture import switch

    monkeypatch.setattr(tracing, "_begun", False)
    monkeypatch.setattr(tracing, "_failed", False)
    monkeypatch.setattr(switch, "_decided", False)
    yield
    sys.modules["otel_npu"].disable()


def test_the_recorder_is_made_once_with_the_configurations_endpoint(
    unbegun: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_NPU_ENABLED", "1")
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")
    asked: list[str] = []

    def endpoint() -> str:
        asked.append("asked")
        return "collector:4317"

    recorder = tracing.recorder(endpoint)
    assert recorder is not None
    assert recorder.settings.environment["OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"] == "collector:4317"
    assert tracing.recorder(endpoint) is recorder
    assert asked == ["asked"]


def test_who_asks_meanwhile_waits_for_the_configurations_endpoint(
    unbegun: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_NPU_ENABLED", "1")
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")
    asked, answered = threading.Event(), threading.Event()
    found: list[object] = []

    def endpoint() -> str:
        asked.set()
        assert not answered.wait(0.3), "somebody has not waited"
        return "collector:4317"

    def other() -> None:
        asked.wait(20)
        found.append(tracing.recorder(lambda: None))
        answered.set()

    thread = threading.Thread(target=other)
    thread.start()
    recorder = tracing.recorder(endpoint)
    thread.join(20)
    assert recorder is not None
    assert found == [recorder]
    assert recorder.settings.environment["OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"] == "collector:4317"


def test_a_configuration_that_can_not_be_read_leaves_tracing_off(
    unbegun: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_NPU_ENABLED", "1")

    def endpoint() -> str:
        raise RuntimeError("strange")

    with caplog.at_level(logging.ERROR):
        tracing.recorder(endpoint)
        assert tracing.recorder(endpoint) is None
    (record,) = caplog.records
    assert "vLLM is not affected" in record.getMessage()


def test_spans_that_had_a_way_before_vllm_named_another_keep_it_and_a_line_says_so(
    unbegun: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import otel_npu

    monkeypatch.setenv("OTEL_NPU_ENABLED", "1")
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")
    otel_npu.enable()
    assert tracing.recorder(lambda: "collector:4317") is not None
    (record,) = caplog.records
    assert "tracing was on before vLLM said" in record.getMessage()
