"""One resource for each traced process, as that process's own OpenTelemetry SDK would describe it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING
from urllib.parse import unquote

from opentelemetry.sdk.resources import Resource

from otel_npu import semconv
from otel_npu._version import __version__

if TYPE_CHECKING:
    from otel_npu.wire.frames import Hello


def resource_of(hello: Hello) -> Resource:
    """The resource of the process that said hello.

    Its name follows the SDK's rule: `OTEL_SERVICE_NAME`, else `service.name` in `OTEL_RESOURCE_ATTRIBUTES`, else
    `unknown_service:` and the name of its executable.
    """
    executable = os.path.basename(hello.executable)  # noqa: PTH119  the SDK's rule, to the letter
    attributes: dict[str, str | int] = {
        semconv.SERVICE_NAME: f"unknown_service:{executable}" if executable else "unknown_service",
        semconv.SERVICE_INSTANCE_ID: hello.instance_id,
        semconv.PROCESS_PID: hello.pid,
        semconv.HOST_NAME: hello.host,
        "telemetry.sdk.language": "python",
        "telemetry.sdk.name": "otel-npu",
        "telemetry.sdk.version": __version__,
    }
    if hello.device_kind:
        attributes[semconv.DEVICE_TYPE] = hello.device_kind
    if hello.device_name:
        attributes[semconv.DEVICE_NAME] = hello.device_name
    given = _parse(hello.resource_attributes)
    if hello.service_name:
        given[semconv.SERVICE_NAME] = hello.service_name
    if not given.get(semconv.SERVICE_NAME):
        given.pop(semconv.SERVICE_NAME, None)  # an empty name is none
    return Resource({**attributes, **given})


def _parse(text: str) -> dict[str, str]:
    """`key=value,...` with values percent-encoded. An entry without `=` is left out, as by the SDK."""
    pairs = (entry.partition("=") for entry in text.split(","))
    return {key.strip(): unquote(value.strip()) for key, equals, value in pairs if equals and key.strip()}
