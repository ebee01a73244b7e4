"""The environment, read once into one frozen, validated `Settings`."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

if TYPE_CHECKING:
    from collections.abc import Sequence

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
STAGES: Final = "OTEL_NPU_STAGES"
QUEUE_BYTES: Final = "OTEL_NPU_QUEUE_BYTES"
SESSION: Final = "OTEL_NPU_SESSION"
PURE_PYTHON: Final = "OTEL_NPU_PURE_PYTHON"

_EXPORTS: Final = ("relay", "inprocess")
_REQUEST_SPANS: Final = ("summary", "detail", "off")
STANDBY: Final = "standby"
_TRUE: Final = frozenset({"1", "true", "yes", "on"})
_FALSE: Final = frozenset({"", "0", "false", "no", "off"})


class SettingsError(ValueError):
    """A variable, or a field of `Settings`, holds what it does not take; the message says which, and what it takes."""


class NamedStage(NamedTuple):
    """A function that is to be a stage of this name: a global one or `Class.method`, by module and qualified name."""

    module: str
    qualname: str
    name: str


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
        stages: Functions that are stages although nothing in their code says so.
        queue_bytes: How many bytes of spans the relay holds at most while their receiver takes none.
        root_traces: Whether steps outside of any sampled trace may begin traces of their own.
        environment: Standard `OTEL_*` variables for the exporter, in the place of this process's own.
        standby: Whether nothing is captured until `otel-npu on` says so.

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
    stages: tuple[NamedStage, ...] = ()
    queue_bytes: int = 64_000_000
    root_traces: bool = True
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)  # it may hold credentials
    standby: bool = False

    def __post_init__(self) -> None:
        for name, (good, takes) in _FIELDS.items():
            value = getattr(self, name)
            if not good(value):
                shown = "..." if name == "environment" else repr(value)
                raise SettingsError(f"Settings({name}={shown}): takes {takes}")

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Settings:
        """Read the settings from the environment.

        Args:
            environment: Where to read them; the process's own unless it is given.

        Raises:
            SettingsError: For the first variable with a bad value.
        """
        if environment is None:
            environment = os.environ
        read = _Reader(environment)
        wanted: bool | str = read(ENABLED, _enabled, default=False)
        enabled = read(ENABLED_ALIAS, _flag, default=False) or bool(wanted)
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
            stages=read(STAGES, _stages, default=cls.stages),
            queue_bytes=read(QUEUE_BYTES, _bytes, default=cls.queue_bytes),
            root_traces=not off and sampler != "parentbased_always_off",
            standby=wanted == STANDBY,
        )


def sdk_disabled(environment: Mapping[str, str] | None = None) -> bool:
    """Whether the standard variable turns all tracing off: by "true" in any case, and by nothing else."""
    return (os.environ if environment is None else environment).get("OTEL_SDK_DISABLED", "").strip().lower() == "true"


VARIABLES: Final = (
    *(ENABLED, ENABLED_ALIAS, DEVICE, EXPORT, REQUEST_SPANS, STEPS_PER_SECOND, SLOW_STEP, HANG_SECONDS, LOG_STAGES),
    *(STAGES, QUEUE_BYTES, SESSION, PURE_PYTHON),
)


def unknown_variables(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """The variables that look like ours and that nothing reads, each with the one that may be meant, if any."""
    unknown = {}
    for name in sorted(os.environ if environment is None else environment):
        match = re.fullmatch(r"OTEL_?NPU_(.*)", name, re.IGNORECASE | re.DOTALL)
        if match is not None and name not in VARIABLES:
            import difflib  # seldom wanted

            ours = {variable.removeprefix("OTEL_NPU_"): variable for variable in VARIABLES}
            unknown[name] = "".join(ours[word] for word in difflib.get_close_matches(match[1].upper(), ours, 1))
    return unknown


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


def _enabled(variable: str, value: str) -> Any:
    if value.lower() in (*_TRUE, *_FALSE, STANDBY):
        return STANDBY if value.lower() == STANDBY else _flag(variable, value)
    raise _error(variable, value, "1, 0 or standby (also true, yes, on; false, no, off)")


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


def _words(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}"


_STAGES_TAKES: Final = "module:function=name, or module:Class.method=name; several are separated by commas"
_STAGE: Final = re.compile(r"(?P<module>[^:=]+):(?P<qualname>[^:=]+)=(?P<name>[^=]{1,128})")


def _stages(variable: str, value: str) -> tuple[NamedStage, ...]:
    stages = []
    for entry in value.split(","):
        match = _STAGE.fullmatch(entry.strip())
        stage = None if match is None else NamedStage(*(part.strip() for part in match.groups()))
        if stage is None or not (_is_path(stage.module) and _is_path(stage.qualname) and stage.name.isprintable()):
            raise _error(variable, value, _STAGES_TAKES)
        stages.append(stage)
    return tuple(stages)


def _is_path(text: str) -> bool:
    return all(part.isidentifier() for part in text.split("."))


def _one_of(*words: str) -> Callable[[str, str], str]:
    def parse(variable: str, value: str) -> str:
        if value.lower() not in words:
            raise _error(variable, value, _words(words))
        return value.lower()

    return parse


_DEVICE_TAKES: Final = "auto, npu, cpu, simulated or a torch device type such as cuda"


def _device(variable: str, value: str) -> str:
    if not _is_device(value):
        raise _error(variable, value, _DEVICE_TAKES)
    return value


def _is_device(value: object) -> bool:
    # Whether such a device exists is only known once torch is there; here the form alone is checked.
    return isinstance(value, str) and re.fullmatch(r"[a-z][a-z0-9_]*", value) is not None


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_environment(value: object) -> bool:
    return isinstance(value, Mapping) and all(isinstance(item, str) for pair in value.items() for item in pair)


# What each field takes, in words that a program's author understands: no variable need have been set.
def _are_named_stages(value: object) -> bool:
    return isinstance(value, tuple) and all(
        isinstance(stage, NamedStage) and _is_path(stage.module) and _is_path(stage.qualname) and bool(stage.name)
        for stage in value
    )


_FIELDS: Final[dict[str, tuple[Callable[[Any], bool], str]]] = {
    **dict.fromkeys(("enabled", "log_stages", "root_traces", "standby"), (_is_flag, "True or False")),
    "device": (_is_device, _DEVICE_TAKES),
    "export": (lambda value: value in _EXPORTS, _words(_EXPORTS)),
    "request_spans": (lambda value: value in _REQUEST_SPANS, _words(_REQUEST_SPANS)),
    "steps_per_second": (
        lambda value: _is_number(value) and value >= 0,
        "a number of steps a second, 0 or more; math.inf for every one",
    ),
    "slow_step": (
        lambda value: _is_number(value) and value > 1,
        "how many times the usual, a number above 1; math.inf for none",
    ),
    "hang_seconds": (
        lambda value: _is_number(value) and value > 0,
        "a number of seconds above 0; math.inf for never",
    ),
    "queue_bytes": (
        lambda value: _is_number(value) and value >= _LEAST_QUEUE_BYTES,
        _QUEUE_TAKES,
    ),
    "stages": (_are_named_stages, "a tuple of NamedStage(module, qualname, name)"),
    "environment": (_is_environment, "a mapping of variables to their values, both text"),
}
