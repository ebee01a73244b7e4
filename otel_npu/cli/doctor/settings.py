"""The checks of the environment: each variable that is read, and those that look like one."""

from __future__ import annotations

import difflib
import os
import re
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from otel_npu import settings
from otel_npu.cli.doctor.findings import Finding, failed, ok, warning
from otel_npu.settings import Settings, SettingsError, sdk_disabled
from otel_npu.wire import rendezvous

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TRACING: Final = "tracing"
ENVIRONMENT: Final = "environment"

_PREFIX: Final = "OTEL_NPU_"
_OURS: Final = (
    settings.ENABLED,
    settings.ENABLED_ALIAS,
    settings.DEVICE,
    settings.EXPORT,
    settings.REQUEST_SPANS,
    settings.STEPS_PER_SECOND,
    settings.HANG_SECONDS,
    settings.LOG_STAGES,
)


def wanted_device() -> str:
    """What `OTEL_NPU_DEVICE` asks for; `auto` if it can't be read."""
    try:
        return Settings.from_environment({settings.DEVICE: os.environ.get(settings.DEVICE, "")}).device
    except SettingsError:
        return Settings.device


def wanted_export() -> str:
    """What `OTEL_NPU_EXPORT` asks for; `relay` if it can't be read."""
    try:
        return Settings.from_environment({settings.EXPORT: os.environ.get(settings.EXPORT, "")}).export
    except SettingsError:
        return Settings.export


def tracing() -> Iterator[Finding]:
    """Whether tracing is switched on here."""
    on = [name for name in (settings.ENABLED, settings.ENABLED_ALIAS) if _flag_is_set(name)]
    if sdk_disabled():
        yield warning(TRACING, "off: OTEL_SDK_DISABLED=true", "unset OTEL_SDK_DISABLED to trace")
    elif on:
        yield ok(TRACING, f"on: {on[0]}={os.environ[on[0]]}")
    else:
        yield warning(TRACING, "off in this environment", f"set {settings.ENABLED}=1 where the program starts")


def environment() -> Iterator[Finding]:
    """One finding for each variable that holds what it does not take, or one that all are fine."""
    problems = [*_bad_values(), *_unknown_names()]
    yield from problems
    if not problems:
        known = [name for name in _OURS if os.environ.get(name, "").strip()]
        standard = sorted(name for name in os.environ if name.startswith("OTEL_") and not name.startswith(_PREFIX))
        yield ok(ENVIRONMENT, f"valid: {', '.join([*known, *standard]) or 'nothing is set, so all are defaults'}")


def _flag_is_set(name: str) -> bool:
    try:
        return Settings.from_environment({name: os.environ.get(name, "")}).enabled
    except SettingsError:
        return False


def _bad_values() -> Iterator[Finding]:
    for name in _OURS:
        try:
            Settings.from_environment({name: os.environ.get(name, "")})
        except SettingsError as error:
            yield _bad(error)
    if os.environ.get(settings.SESSION):
        try:
            rendezvous.session_id()
        except OSError as error:
            yield _bad(error)
    for name, value in sorted(os.environ.items()):
        complaint = _standard_complaint(name, value.strip()) if value.strip() else None
        if complaint is not None:
            yield complaint


def _bad(error: Exception) -> Finding:
    found, _, takes = str(error).partition(": ")
    return failed(ENVIRONMENT, found, takes)


def _unknown_names() -> Iterator[Finding]:
    known = (*_OURS, settings.SESSION)
    for name in sorted(os.environ):
        if name.startswith(_PREFIX) and name not in known:
            nearest = difflib.get_close_matches(name, known, 1)
            cure = f"is {nearest[0]} meant?" if nearest else "unset it: nothing reads it"
            yield warning(ENVIRONMENT, f"{name} is unknown", cure)


def _standard_complaint(name: str, value: str) -> Finding | None:
    """What is wrong with a standard variable that the relay or its exporters read."""
    for pattern, (takes, good) in _STANDARD.items():
        if not re.fullmatch(pattern, name):
            continue
        if good(value):
            return None
        shown = name if _holds_secrets(name) else f"{name}={value!r}"
        if name in _IGNORED_IF_BAD:
            return warning(ENVIRONMENT, f"{shown} is ignored", f"takes {takes}")
        return failed(ENVIRONMENT, shown, f"takes {takes}")
    return None


def _holds_secrets(name: str) -> bool:
    return name.endswith(("_HEADERS", "_ENDPOINT"))


def _one_of(*words: str) -> tuple[str, Callable[[str], bool]]:
    return " or ".join(words), lambda value: value.lower() in words


def _whole_number(value: str) -> bool:
    return value.isascii() and value.isdecimal()


def _positive(value: str) -> bool:
    return _whole_number(value) and int(value) > 0


def _seconds(value: str) -> bool:
    return re.fullmatch(r"\d+(\.\d*)?|\.\d+", value) is not None and float(value) > 0


def _ratio(value: str) -> bool:
    return re.fullmatch(r"\d*\.?\d+|\d+\.", value) is not None and 0 <= float(value) <= 1


def _pairs(value: str) -> bool:
    return all(re.fullmatch(r"[^=\s]+\s*=.*", entry.strip()) for entry in value.split(",") if entry.strip())


def _endpoint(value: str) -> bool:
    try:
        parts = urlsplit(value if "://" in value else f"grpc://{value}")
        return parts.scheme in ("http", "https", "grpc", "grpcs", "unix", "dns") and bool(parts.netloc or parts.path)
    except ValueError:
        return False


def _exporters(value: str) -> bool:
    installed = {point.name for point in entry_points(group="opentelemetry_traces_exporter")}
    return all(name.strip() in {*installed, "otlp", "none"} for name in value.split(",") if name.strip())


_SAMPLERS: Final = tuple(
    f"{parent}{name}" for parent in ("", "parentbased_") for name in ("always_on", "always_off", "traceidratio")
)
_OTLP: Final = "OTEL_EXPORTER_OTLP_(TRACES_)?"
# The rows name what is read by the relay and by the exporters that it makes; others are not our business.
_STANDARD: Final[dict[str, tuple[str, Callable[[str], bool]]]] = {
    "OTEL_SDK_DISABLED": _one_of("true", "false"),
    "OTEL_TRACES_SAMPLER": _one_of(*_SAMPLERS),
    "OTEL_TRACES_SAMPLER_ARG": ("a number from 0 to 1", _ratio),
    "OTEL_TRACES_EXPORTER": ("otlp, none, or the name of an exporter that is installed", _exporters),
    "OTEL_RESOURCE_ATTRIBUTES": ("key=value pairs, separated by commas", _pairs),
    f"{_OTLP}ENDPOINT": ("a URL such as http://collector:4317", _endpoint),
    f"{_OTLP}PROTOCOL": ("grpc or http/protobuf", lambda value: value in ("grpc", "http/protobuf")),
    f"{_OTLP}HEADERS": ("name=value pairs, separated by commas, values percent-encoded", _pairs),
    f"{_OTLP}INSECURE": _one_of("true", "false"),
    f"{_OTLP}COMPRESSION": _one_of("gzip", "deflate", "none"),
    f"{_OTLP}TIMEOUT": ("a number of seconds above 0", _seconds),
    f"{_OTLP}(CERTIFICATE|CLIENT_KEY|CLIENT_CERTIFICATE)": (
        "the path of a file that can be read",
        lambda value: Path(value).is_file() and os.access(value, os.R_OK),
    ),
    "OTEL_BSP_(SCHEDULE_DELAY|MAX_QUEUE_SIZE|MAX_EXPORT_BATCH_SIZE)": ("a whole number above 0", _positive),
    "OTEL_(SPAN|LINK|EVENT)?_?(ATTRIBUTE|LINK|EVENT)_(COUNT|VALUE_LENGTH)_LIMIT": ("a whole number", _whole_number),
}
_IGNORED_IF_BAD: Final = frozenset({"OTEL_SDK_DISABLED", "OTEL_RESOURCE_ATTRIBUTES"})
