"""What a person who has just turned tracing on is told."""

from __future__ import annotations

import logging
import math
import os
import pty
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from otel_npu import announce
from otel_npu.devices.cpu import Cpu
from otel_npu.devices.simulated import SimulatedNpu
from otel_npu.settings import Settings, unknown_variables
from tests.helpers.capturing import capturing

if TYPE_CHECKING:
    from collections.abc import Callable

PROGRAM = """
    import otel_npu
    for _ in range(3):
        with otel_npu.step("decode"), otel_npu.stage("forward"):
            pass
"""


LASTING = """
    import otel_npu, time
    from otel_npu import announce
    announce.LASTING_SECONDS = 0.5
    for _ in range(30):
        with otel_npu.step("decode"), otel_npu.stage("forward"):
            time.sleep(0.1)
"""


def test_a_program_that_lasts_is_told_once_that_it_is_traced(run_program: Callable[..., Any]) -> None:
    environment = {"OTEL_NPU_ENABLED": "1", "OTEL_NPU_DEVICE": "simulated", "OTEL_TRACES_EXPORTER": "none"}
    [line] = run_program(LASTING, environment).stderr.splitlines()
    assert line.endswith(
        "otel-npu is on: stages are timed by simulated (SimulatedNPU); spans go to nobody (OTEL_TRACES_EXPORTER=none); "
        "2 steps a second of each kind are kept as traces, and slow ones"
    )


def test_a_person_at_a_terminal_is_told_at_once() -> None:
    environment = {"OTEL_NPU_ENABLED": "1", "OTEL_NPU_DEVICE": "cpu", "OTEL_TRACES_EXPORTER": "none"}
    screen, terminal = pty.openpty()
    source = PROGRAM.replace("\n    ", "\n")
    with os.fdopen(screen, "rb", buffering=0) as said:
        subprocess.run([sys.executable, "-c", source], env={**os.environ, **environment}, stderr=terminal, check=True)
        os.close(terminal)
        assert said.read(4096).count(b"otel-npu is on: ") == 1


def test_the_output_of_a_command_is_the_same_with_tracing_off_and_on(run_program: Callable[..., Any]) -> None:
    environment = {"OTEL_NPU_DEVICE": "cpu", "OTEL_TRACES_EXPORTER": "none"}
    for enabled in "01":
        done = run_program(PROGRAM, {**environment, "OTEL_NPU_ENABLED": enabled})
        assert (done.stdout, done.stderr) == ("", "")


def test_a_program_whose_tracing_has_ended_is_not_told_that_it_is_on(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "otel_npu"), capturing() as captured:
        recorder = captured.recorder
        recorder.stop_capture()
        recorder.idle._device_since = 0.0
        recorder.idle._watch()
    assert "is on" not in caplog.text


@pytest.mark.slow
def test_whoever_has_set_up_logging_decides_who_sees_it(run_program: Callable[..., Any]) -> None:
    environment = {"OTEL_NPU_ENABLED": "1", "OTEL_NPU_DEVICE": "cpu", "OTEL_TRACES_EXPORTER": "none"}
    for level, lines in (("WARNING", 0), ("INFO", 1)):
        source = f"import logging; logging.basicConfig(level='{level}')\n" + PROGRAM.replace("\n    ", "\n")
        assert len(run_program(source, environment).stderr.splitlines()) == lines


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"steps_per_second": math.inf}, "every step is kept as a trace"),
        ({"steps_per_second": 0.5, "slow_step": math.inf}, "0.5 steps a second of each kind are kept as traces"),
        ({"steps_per_second": 0, "slow_step": math.inf}, "no step is kept as a trace of its own"),
        ({"root_traces": False}, "no step is kept as a trace of its own"),
    ],
)
def test_it_says_how_many_steps_are_kept(caplog: pytest.LogCaptureFixture, settings: dict[str, Any], said: str) -> None:
    with caplog.at_level(logging.INFO, "otel_npu"):
        assert announce.is_on(Settings(**settings), Cpu(), 0)
    [record] = caplog.records
    assert record.getMessage().endswith(f"; {said}")
    assert "by the host's clock, for there is no device" in record.getMessage()


@pytest.mark.parametrize(
    ("environment", "text"),
    [
        ({}, "http://localhost:4317 (grpc)"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a:1"}, "http://a:1 (grpc)"),
        (
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a:1", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://b:2/x"},
            "http://b:2/x (grpc)",
        ),
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}, "http://localhost:4318 (http/protobuf)"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "https://me:secret@a/?key=secret"}, "https://***@a/?key=*** (grpc)"),
        ({"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://a:1"}, "nobody"),
        ({"OTEL_TRACES_EXPORTER": "console"}, "the exporters of OTEL_TRACES_EXPORTER=console"),
    ],
)
def test_it_says_where_spans_go_without_credentials(environment: dict[str, str], text: str) -> None:
    assert announce.destination(environment).startswith(text)


@pytest.mark.parametrize(
    ("variable", "value"),
    [("ENDPOINT", '"http://collector:4317"'), ("TRACES_PROTOCOL", "http/json"), ("CERTIFICATE", "/nowhere.pem")],
)
def test_it_does_not_say_that_spans_go_where_they_can_not(
    caplog: pytest.LogCaptureFixture, variable: str, value: str
) -> None:
    """The relay has a line for that, which says what is wrong."""
    with caplog.at_level(logging.INFO, "otel_npu"):
        assert announce.is_on(Settings(environment={f"OTEL_EXPORTER_OTLP_{variable}": value}), Cpu(), 0)
    assert caplog.records == []


def test_where_vllm_gives_the_endpoint_that_one_is_told(caplog: pytest.LogCaptureFixture) -> None:
    given = {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://from-the-flag:4317"}
    with caplog.at_level(logging.INFO, "otel_npu"):
        assert announce.is_on(Settings(environment=given), SimulatedNpu(), 0)
    assert "spans go to http://from-the-flag:4317" in caplog.text


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("OTEL_NPU_ENABLE", "OTEL_NPU_ENABLED"),
        ("OTELNPU_ENABLED", "OTEL_NPU_ENABLED"),
        ("otel_npu_enabled", "OTEL_NPU_ENABLED"),
        ("OTEL_NPU_STEP_PER_SECONDS", "OTEL_NPU_STEPS_PER_SECOND"),
        ("OTEL_NPU_REQUESTS_SPAN", "OTEL_NPU_REQUEST_SPANS"),
        ("OTEL_NPU_XYZ", ""),
    ],
)
def test_a_variable_that_looks_like_ours_is_found_with_the_one_that_is_meant(name: str, meant: str) -> None:
    assert unknown_variables({name: "1", "OTEL_NPU_ENABLED": "1", "PATH": "/bin"}) == {name: meant}


def test_a_mistyped_variable_is_one_warning_though_tracing_is_off(run_program: Callable[..., Any]) -> None:
    done = run_program(PROGRAM, {"OTEL_NPU_ENABLE": "1"})
    assert done.stderr == "OTEL_NPU_ENABLE is no variable of otel-npu's: is OTEL_NPU_ENABLED meant?\n"


@pytest.mark.parametrize(
    ("device", "why"), [("npu", "torch_npu is not installed"), ("gpu", "torch knows no such device")]
)
@pytest.mark.slow
def test_a_device_that_can_not_come_is_one_clear_line(run_program: Callable[..., Any], device: str, why: str) -> None:
    pytest.importorskip("torch")
    hidden = "import sys, importlib.util; find = importlib.util.find_spec\n"
    hidden += "importlib.util.find_spec = lambda name, *rest: None if name == 'torch_npu' else find(name, *rest)\n"
    environment = {"OTEL_NPU_ENABLED": "1", "OTEL_NPU_DEVICE": device, "OTEL_TRACES_EXPORTER": "none"}
    environment["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    done = run_program(hidden + "import torch\n" + PROGRAM.replace("\n    ", "\n"), environment)
    assert done.stderr == f"OTEL_NPU_DEVICE={device!r}: {why}; tracing is off\n"
