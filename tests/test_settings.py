"""The environment: what each variable takes, and what happens when it gets something else."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import pytest

import otel_npu
from otel_npu.capture import switch
from otel_npu.settings import NamedStage, Settings, SettingsError

if TYPE_CHECKING:
    from collections.abc import Callable

FLAG = "1 or 0 (also true, yes, on; false, no, off)"
ENABLED = "1, 0 or standby (also true, yes, on; false, no, off)"
RATE = "a number of steps a second, 0 or more, or 'all'"
FACTOR = "how many times the usual, a number above 1, or 'off'"
BYTES = "a whole number of bytes, 1000000 or more"
STAGES = "module:function=name, or module:Class.method=name; several are separated by commas"
SECONDS = "a number of seconds above 0, or 'never'"
DEVICE = "auto, npu, cpu, simulated or a torch device type such as cuda"
BAD = [
    ("OTEL_NPU_ENABLED", "maybe", ENABLED),
    ("VLLM_ASCEND_MODEL_EXECUTE_TIME_OBSERVE", "2", FLAG),
    ("OTEL_NPU_DEVICE", "npu:0", DEVICE),
    ("OTEL_NPU_DEVICE", "a device", DEVICE),
    ("OTEL_NPU_EXPORT", "collector", "relay or inprocess"),
    ("OTEL_NPU_REQUEST_SPANS", "all", "summary, detail or off"),
    ("OTEL_NPU_STEPS_PER_SECOND", "many", RATE),
    ("OTEL_NPU_STEPS_PER_SECOND", "-1", RATE),
    ("OTEL_NPU_STEPS_PER_SECOND", "nan", RATE),
    ("OTEL_NPU_STEPS_PER_SECOND", "inf", RATE),
    ("OTEL_NPU_SLOW_STEP", "1", FACTOR),
    ("OTEL_NPU_SLOW_STEP", "never", FACTOR),
    ("OTEL_NPU_HANG_SECONDS", "0", SECONDS),
    ("OTEL_NPU_QUEUE_BYTES", "64MB", BYTES),
    ("OTEL_NPU_QUEUE_BYTES", "999999", BYTES),
    ("OTEL_NPU_HANG_SECONDS", "-3", SECONDS),
    ("OTEL_NPU_HANG_SECONDS", "soon", SECONDS),
    ("OTEL_NPU_HANG_SECONDS", "nan", SECONDS),
    ("OTEL_NPU_LOG_STAGES", "all", FLAG),
    *(
        ("OTEL_NPU_STAGES", value, STAGES)
        for value in (
            "model",
            "model:f",
            "model=f",
            "model:f=",
            ":f=x",
            "a:b=c,",
            "a:b:c=d",
            "a b:c=d",
            "a.:b=c",
            "a:b=c=d",
        )
    ),
]


def read(**environment: str) -> Settings:
    return Settings.from_environment(environment)


def test_without_any_variable_tracing_is_off_and_the_defaults_hold() -> None:
    assert read() == Settings(
        enabled=False, device="auto", export="relay", steps_per_second=2, hang_seconds=30, log_stages=False
    )


@pytest.mark.parametrize(
    ("variable", "value", "field", "expected"),
    [
        ("OTEL_NPU_STAGES", "a.b:f=moe dispatch", "stages", (NamedStage("a.b", "f", "moe dispatch"),)),
        (
            "OTEL_NPU_STAGES",
            " a:C.f = x , b_2:g=y",
            "stages",
            (NamedStage("a", "C.f", "x"), NamedStage("b_2", "g", "y")),
        ),
        ("OTEL_NPU_ENABLED", "1", "enabled", True),
        ("OTEL_NPU_ENABLED", "true", "enabled", True),
        ("OTEL_NPU_ENABLED", " Yes ", "enabled", True),
        ("OTEL_NPU_ENABLED", "ON", "enabled", True),
        ("OTEL_NPU_ENABLED", "0", "enabled", False),
        ("OTEL_NPU_ENABLED", "false", "enabled", False),
        ("OTEL_NPU_ENABLED", "No", "enabled", False),
        ("OTEL_NPU_ENABLED", "off", "enabled", False),
        ("VLLM_ASCEND_MODEL_EXECUTE_TIME_OBSERVE", "1", "enabled", True),
        ("OTEL_NPU_DEVICE", "cpu", "device", "cpu"),
        ("OTEL_NPU_DEVICE", "cuda", "device", "cuda"),
        ("OTEL_NPU_EXPORT", "InProcess", "export", "inprocess"),
        ("OTEL_NPU_REQUEST_SPANS", "Off", "request_spans", "off"),
        ("OTEL_NPU_STEPS_PER_SECOND", "0", "steps_per_second", 0),
        ("OTEL_NPU_STEPS_PER_SECOND", "0.5", "steps_per_second", 0.5),
        ("OTEL_NPU_STEPS_PER_SECOND", "all", "steps_per_second", math.inf),
        ("OTEL_NPU_SLOW_STEP", "1.5", "slow_step", 1.5),
        ("OTEL_NPU_SLOW_STEP", "Off", "slow_step", math.inf),
        ("OTEL_NPU_HANG_SECONDS", "1.5", "hang_seconds", 1.5),
        ("OTEL_NPU_QUEUE_BYTES", "1000000", "queue_bytes", 1_000_000),
        ("OTEL_NPU_HANG_SECONDS", "Never", "hang_seconds", math.inf),
        ("OTEL_NPU_LOG_STAGES", "1", "log_stages", True),
        ("OTEL_TRACES_SAMPLER", "always_off", "steps_per_second", 0),
        ("OTEL_TRACES_SAMPLER", "parentbased_always_off", "root_traces", False),
        ("OTEL_TRACES_SAMPLER", "parentbased_always_on", "root_traces", True),
    ],
)
def test_a_variable_sets_its_field(variable: str, value: str, field: str, expected: object) -> None:
    assert getattr(read(**{variable: value}), field) == expected


@pytest.mark.parametrize("variable", sorted({variable for variable, _, _ in BAD}))
def test_a_blank_variable_is_as_if_it_were_unset(variable: str) -> None:
    assert read(**{variable: " "}) == read()


def test_the_alias_enables_and_does_not_disable() -> None:
    alias = "VLLM_ASCEND_MODEL_EXECUTE_TIME_OBSERVE"
    assert read(**{"OTEL_NPU_ENABLED": "0", alias: "1"}).enabled
    assert read(**{"OTEL_NPU_ENABLED": "1", alias: "0"}).enabled


@pytest.mark.usefixtures("undecided")
@pytest.mark.parametrize(("variable", "value", "takes"), BAD)
def test_a_bad_value_is_one_clear_line_and_tracing_stays_off(
    variable: str, value: str, takes: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_NPU_ENABLED", "1")
    monkeypatch.setenv(variable, value)
    for _ in range(3):
        with otel_npu.step("decode"), otel_npu.stage("forward"):
            pass
    assert switch.current_recorder() is None
    assert [record.getMessage() for record in caplog.records] == [
        f"{variable}={value!r}: takes {takes}; tracing is off"
    ]
    caplog.clear()
    assert not otel_npu.enable()
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    "bad",
    [
        {"device": ""},
        {"device": "npu:1"},
        {"export": "file"},
        {"steps_per_second": -1},
        {"steps_per_second": math.nan},
        {"slow_step": 1},
        {"hang_seconds": 0},
        {"hang_seconds": math.nan},
        {"enabled": "yes"},
        {"device": 3},
        {"request_spans": ["summary"]},
        {"steps_per_second": "lots"},
        {"steps_per_second": True},
        {"steps_per_second": None},
        {"slow_step": "off"},
        {"hang_seconds": None},
        {"log_stages": 1},
        {"root_traces": "no"},
        {"environment": None},
        {"environment": {"OTEL_EXPORTER_OTLP_TIMEOUT": 10}},
    ],
)
def test_settings_made_by_a_program_are_checked_too(bad: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match="takes"):
        Settings(**bad)


def test_the_error_names_the_field_and_is_one_that_a_program_can_catch() -> None:
    with pytest.raises(otel_npu.SettingsError, match=r"^Settings\(steps_per_second='lots'\): takes a number of steps"):
        otel_npu.Settings(steps_per_second="lots")  # type: ignore[arg-type]


def test_what_the_environment_holds_is_in_no_text_about_settings(
    run_program: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = {"OTEL_EXPORTER_OTLP_HEADERS": "authorization=hush"}
    assert "hush" not in repr(Settings(environment=secret))
    with pytest.raises(SettingsError) as error:
        Settings(environment={**secret, "OTEL_EXPORTER_OTLP_TIMEOUT": 1})  # type: ignore[dict-item]
    assert "hush" not in str(error.value)
    done = run_program("import otel_npu; help(otel_npu.Settings); help(otel_npu)", secret)
    assert "from_environment" in done.stdout
    assert "hush" not in done.stdout


def test_settings_do_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().device = "cpu"  # type: ignore[misc]


def test_without_logging_set_up_a_program_sees_the_line_and_runs_on(run_program: Callable[..., Any]) -> None:
    done = run_program(
        """
        import otel_npu

        @otel_npu.stage("forward")
        def forward():
            return "ran"

        with otel_npu.step():
            print(forward())
        """,
        {"OTEL_NPU_ENABLED": "1", "OTEL_NPU_HANG_SECONDS": "soon"},
    )
    assert done.stdout == "ran\n"
    assert done.stderr == f"OTEL_NPU_HANG_SECONDS='soon': takes {SECONDS}; tracing is off\n"


def test_a_bad_session_costs_the_spans_and_not_the_program(run_program: Callable[..., Any]) -> None:
    done = run_program(
        """
        import otel_npu
        with otel_npu.stage("forward"):
            pass
        print(otel_npu.flush(1))
        """,
        {"OTEL_NPU_ENABLED": "1", "OTEL_NPU_SESSION": "../elsewhere"},
    )
    assert done.stdout == "False\n"
    (line,) = done.stderr.splitlines()
    assert "OTEL_NPU_SESSION='../elsewhere': takes" in line
