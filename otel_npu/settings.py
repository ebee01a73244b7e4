"""The environment, read once into one frozen, validated `Settings`."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_T = TypeVar("_T")

ENABLED: Final = "OTEL_NPU_ENABLED"
ENABLED_ALIAS: Final = "VLLM_ASCEND_MODEL_EXECUTE_TIME_OBSERVE"
DEVICE: Final = "OTEL_NPU_DEVICE"
EXPORT: Final = "OTEL_NPU_EXPORT"
REQUEST_SPANS: Final = "OTEL_NPU_REQUEST_SPANS"
STEPS_PER_SECOND: Final = "OTEL_NPU_STEPS_PER_SECOND"
SLOW_STEP: Final = "OTEL_NPU_SLOW_STEP"
HANG_SECONDS: Final = "OTEL_NPU_HANG_SECONDS"
LOG_STAGES: Final = "OTEL_NPU_LOG_STAGES"
QUEUE_BYTES: Final = "OTEL_NPU_QUEUE_BYTES"
SESSION: Final = "OTEL_NPU_SESSION"

_EXPORTS: Final = ("relay", "inprocess")
_REQUEST_SPANS: Final = ("summary", "detail", "off")
_TRUE: Final = frozenset({"1", "true", "yes", "on"})
_FALSE: Final = frozenset({"", "0", "false", "no", "off"})


class SettingsError(ValueError):
    """A variable holds what it does not take; the message names the variable, the value and what it takes."""


@dataclass(frozen=True)
class Settings:
    """What can be chosen, with the defaults. Where spans go is said by the standard `OTEL_*` variables.

    Attributes:
        enabled: Whether anything is captured.
        device: `auto`, `npu`, `cpu`, `simulated` or a torch device type such as `cuda`.
        export: `relay` (a process of its own) or `inprocess` (a thread of this one).
        request_spans: `summary` (each sampled request's queue, prefill and decode, with its slowest steps),
            `detail` (with all steps, up to 256 of each phase) or `off`.
        steps_per_second: Step traces kept each second, of each kind of step; `math.inf` keeps every one.
        slow_step: A step that takes so many times as long as is usual for its kind is kept too; `math.inf` none.
        hang_seconds: After how many seconds a stage is reported as unfinished; `math.inf` never.
        log_stages: Whether each resolved step is logged as one line.
        queue_bytes: How many bytes of spans the relay holds at most while their receiver takes none.
        root_traces: Whether steps outside of any sampled trace may begin traces of their own.
        environment: Standard `OTEL_*` variables for the exporter, in the place of this process's own.

    Raises:
        SettingsError: A value is not one that the field takes.
    """

    enabled: bool = True
    device: str = "auto"
    export: str = "relay"
    request_spans: str = "summary"
    steps_per_second: float = 2.0
    slow_step: float = 3.0
    hang_seconds: float = 30.0
    log_stages: bool = False
    queue_bytes: int = 64_000_000
    root_traces: bool = True
    environment: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _device(DEVICE, self.device)
        if self.export not in _EXPORTS:
            raise _error(EXPORT, self.export, " or ".join(_EXPORTS))
        if self.request_spans not in _REQUEST_SPANS:
            raise _error(REQUEST_SPANS, self.request_spans, " or ".join(_REQUEST_SPANS))
        if not self.steps_per_second >= 0:
            raise _error(STEPS_PER_SECOND, str(self.steps_per_second), _RATE_TAKES)
        if not self.slow_step > 1:
            raise _error(SLOW_STEP, str(self.slow_step), _SLOW_TAKES)
        if not self.hang_seconds > 0:
            raise _error(HANG_SECONDS, str(self.hang_seconds), _HANG_TAKES)
        if not self.queue_bytes >= _LEAST_QUEUE_BYTES:
            raise _error(QUEUE_BYTES, str(self.queue_bytes), _QUEUE_TAKES)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Settings:
        """Read the settings from the environment.

        Raises:
            SettingsError: For the first variable with a bad value.
        """
        read = _Reader(environment)
        flags = [read(variable, _flag, default=False) for variable in (ENABLED, ENABLED_ALIAS)]  # both are checked
        enabled = any(flags)
        if sdk_disabled(environment):
            enabled = False
        sampler = environment.get("OTEL_TRACES_SAMPLER", "").strip().lower()
        off = sampler == "always_off"
        return cls(
            enabled=enabled,
            device=read(DEVICE, _device, default=cls.device),
            export=read(EXPORT, _one_of(*_EXPORTS), default=cls.export),
            request_spans=read(REQUEST_SPANS, _one_of(*_REQUEST_SPANS), default=cls.request_spans),
            steps_per_second=0.0 if off else read(STEPS_PER_SECOND, _rate, default=cls.steps_per_second),
            slow_step=math.inf if off else read(SLOW_STEP, _factor, default=cls.slow_step),
            hang_seconds=read(HANG_SECONDS, _seconds, default=cls.hang_seconds),
            log_stages=read(LOG_STAGES, _flag, default=cls.log_stages),
            queue_bytes=read(QUEUE_BYTES, _bytes, default=cls.queue_bytes),
            root_traces=not off and sampler != "parentbased_always_off",
        )


def sdk_disabled(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the standard variable turns all tracing off: by "true" in any case, and by nothing else."""
    return environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"


class _Reader:
    """Reads one variable at a time; one that is unset or blank has its default."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment

    def __call__(self, variable: str, parse: Callable[[str, str], _T], *, default: _T) -> _T:
        value = self._environment.get(variable, "").strip()
        return parse(variable, value) if value else default


def _error(variable: str, value: str, takes: str) -> SettingsError:
    return SettingsError(f"{variable}={value!r}: takes {takes}")


def _flag(variable: str, value: str) -> bool:
    if value.lower() in _TRUE:
        return True
    if value.lower() in _FALSE:
        return False
    raise _error(variable, value, "1 or 0 (also true, yes, on; false, no, off)")


_RATE_TAKES: Final = "a number of steps a second, 0 or more, or 'all'"
_SLOW_TAKES: Final = "how many times the usual, a number above 1, or 'off'"
_HANG_TAKES: Final = "a number of seconds above 0, or 'never'"


_LEAST_QUEUE_BYTES: Final = 1_000_000
_QUEUE_TAKES: Final = "a whole number of bytes, 1000000 or more"


def _bytes(variable: str, value: str) -> int:
    if not (value.isascii() and value.isdecimal() and int(value) >= _LEAST_QUEUE_BYTES):
        raise _error(variable, value, _QUEUE_TAKES)
    return int(value)


def _rate(variable: str, value: str) -> float:
    return _number(variable, value, word="all", takes=_RATE_TAKES, allowed=lambda rate: rate >= 0)


def _factor(variable: str, value: str) -> float:
    return _number(variable, value, word="off", takes=_SLOW_TAKES, allowed=lambda factor: factor > 1)


def _seconds(variable: str, value: str) -> float:
    return _number(variable, value, word="never", takes=_HANG_TAKES, allowed=lambda seconds: seconds > 0)


def _number(variable: str, value: str, *, word: str, takes: str, allowed: Callable[[float], bool]) -> float:
    if value.lower() == word:
        return math.inf
    try:
        number = float(value)
    except ValueError:
        raise _error(variable, value, takes) from None
    if not (math.isfinite(number) and allowed(number)):
        raise _error(variable, value, takes)
    return number


def _one_of(*words: str) -> Callable[[str, str], str]:
    def parse(variable: str, value: str) -> str:
        if value.lower() not in words:
            raise _error(variable, value, " or ".join(words))
        return value.lower()

    return parse


def _device(variable: str, value: str) -> str:
    # Whether such a device exists is only known once torch is there; here the form alone is checked.
    if not re.fullmatch(r"[a-z][a-z0-9_]*", value):
        raise _error(variable, value, "auto, npu, cpu, simulated or a torch device type such as cuda")
    return value
