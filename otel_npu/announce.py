"""What a person who has just turned tracing on is told: that it is on, or that a variable's name is not ours."""

from __future__ import annotations

import logging
import math
import os
import sys
from typing import TYPE_CHECKING, Final

from otel_npu import secrets
from otel_npu.settings import unknown_variables
from otel_npu.standard import bad_value

if TYPE_CHECKING:
    from collections.abc import Mapping

    from otel_npu.devices.device import Device
    from otel_npu.settings import Settings

_log = logging.getLogger("otel_npu")

LASTING_SECONDS: Final = 10.0
"""A program that is traced for so long is a server: what it writes to stderr is a log."""
_DEFAULTS: Final = {"grpc": "http://localhost:4317", "http/protobuf": "http://localhost:4318"}


def unknown_names() -> None:
    """One warning for each variable that looks like one of ours and is none."""
    for name, meant in unknown_variables().items():
        _log.warning("%s is no variable of otel-npu's%s", name, f": is {meant} meant?" if meant else "")


def is_on(settings: Settings, device: Device, seconds: float) -> bool:
    """One line: that it is on, by whose clock, where spans go and how many steps are kept.

    A person at a terminal is told at once, and so is a program that has set up logging. Any other is told when it has
    lasted: the output of a command is read by somebody else, who gets the same with tracing on as with tracing off.

    Args:
        settings: What was chosen.
        device: Whose clock it is.
        seconds: How long it has been on.

    Returns:
        Whether all is said.
    """
    if seconds < LASTING_SECONDS and not _log.hasHandlers() and not _at_terminal():
        return False
    clock = "the host's clock, for there is no device" if device.host_clock else _device(device)
    environment = {**os.environ, **settings.environment}
    if _leads_nowhere(environment):
        return True  # the relay says so, and why
    where = destination(environment)
    _say(f"otel-npu is on: stages are timed by {clock}; spans go to {where}; {_kept(settings)}")
    return True


def stands_by() -> None:
    """One line: that nothing is captured yet."""
    _say("otel-npu stands by and captures nothing until somebody says `otel-npu on`")


def _at_terminal() -> bool:
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):  # there is none, or it is closed
        return False


def _say(text: str) -> None:
    if _log.hasHandlers():
        _log.info("%s", text)  # whoever has set up logging decides who sees it
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s %(asctime)s [%(name)s] %(message)s"))
    handler.handle(_log.makeRecord(_log.name, logging.INFO, __file__, 0, text, (), None))


def destination(environment: Mapping[str, str]) -> str:
    """Where the standard variables send spans, without credentials."""

    def first(*variables: str, default: str) -> str:
        return next((value for name in variables if (value := environment.get(name, "").strip())), default)

    exporters = first("OTEL_TRACES_EXPORTER", default="otlp")
    if exporters == "none":
        return "nobody (OTEL_TRACES_EXPORTER=none)"
    if exporters != "otlp":
        return f"the exporters of OTEL_TRACES_EXPORTER={exporters}"
    protocol = first("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL", default="grpc")
    usual = _DEFAULTS.get(protocol, "the default endpoint")
    endpoint = first("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT", default=usual)
    return f"{secrets.masked(endpoint, environment)} ({protocol})"


def _leads_nowhere(environment: Mapping[str, str]) -> bool:
    """Whether the standard variables are such that nothing can be exported."""
    for prefix in ("OTEL_EXPORTER_OTLP_TRACES_", "OTEL_EXPORTER_OTLP_"):
        given = {name: environment.get(prefix + name, "").strip() for name in ("ENDPOINT", "PROTOCOL", "CERTIFICATE")}
        if given["ENDPOINT"].startswith("http://"):
            given["CERTIFICATE"] = ""  # is not read
        if any(value and bad_value(prefix + name, value) for name, value in given.items()):
            return True
    return False


def _device(device: Device) -> str:
    try:
        name = device.name(0)
    except Exception:
        name = ""  # nobody's tracing fails for want of a name
    return f"{device.kind} ({name})" if name else device.kind


def _kept(settings: Settings) -> str:
    rate = settings.steps_per_second
    if rate == math.inf:
        return "every step is kept as a trace"
    if not settings.root_traces or (rate == 0 and settings.slow_step == math.inf):
        return "no step is kept as a trace of its own"
    slow = "" if settings.slow_step == math.inf else ", and slow ones"
    return f"{rate:g} steps a second of each kind are kept as traces{slow}"
