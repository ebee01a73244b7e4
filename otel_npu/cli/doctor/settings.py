"""The checks of the environment: each variable that is read, and those that look like one."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from opentelemetry.sdk.resources import SERVICE_NAME, Resource

from otel_npu import settings
from otel_npu.cli.doctor.findings import Finding, failed, ok, warning
from otel_npu.settings import Settings, SettingsError, sdk_disabled
from otel_npu.standard import bad_value
from otel_npu.wire import rendezvous

if TYPE_CHECKING:
    from collections.abc import Iterator

TRACING: Final = "tracing"
SERVICE: Final = "service name"
ENVIRONMENT: Final = "environment"

_PREFIX: Final = "OTEL_NPU_"
_OURS: Final = tuple(name for name in settings.VARIABLES if name != settings.SESSION)


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


def service() -> Iterator[Finding]:
    """Whether the service has a name, by which its traces are searched."""
    name = str(Resource.create().attributes.get(SERVICE_NAME, ""))
    if name.startswith("unknown_service"):
        cure = f"set OTEL_SERVICE_NAME, for example to vllm: else it is {name!r} that one has to search for"
        yield warning(SERVICE, "it has no name in this environment", cure)
    else:
        yield ok(SERVICE, name)


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
    for name, meant in settings.unknown_variables().items():
        yield warning(
            ENVIRONMENT, f"{name} is unknown", f"is {meant} meant?" if meant else "unset it: nothing reads it"
        )


def _standard_complaint(name: str, value: str) -> Finding | None:
    """What is wrong with a standard variable that the relay or its exporters read."""
    bad = bad_value(name, value)
    if bad is None:
        return None
    if name in _IGNORED_IF_BAD:
        return warning(ENVIRONMENT, f"{bad.shown} is ignored", f"takes {bad.takes}")
    return failed(ENVIRONMENT, bad.shown, f"takes {bad.takes}")


_IGNORED_IF_BAD: Final = frozenset({"OTEL_SDK_DISABLED", "OTEL_RESOURCE_ATTRIBUTES"})
