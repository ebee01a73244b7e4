"""Runs the checks, those that may hang beside one another, and says what they found."""

from __future__ import annotations

import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from otel_npu.cli.doctor import apart, engine, running, runtime, screen, settings
from otel_npu.cli.doctor.findings import Finding, failed, ok
from otel_npu.secrets import masked

if TYPE_CHECKING:
    from collections.abc import Iterator

PYTHON: Final = "Python"
_OLDEST: Final = (3, 10)


def run(*, json: bool) -> int:
    """Check everything and show it; the exit code: 0, or 1 if anything failed."""
    findings = [replace(finding, found=masked(finding.found), cure=masked(finding.cure)) for finding in _all_findings()]
    if json:
        sys.stdout.write(f"{screen.as_json(findings)}\n")
    else:
        screen.show(findings)
    return 1 if screen.any_failed(findings) else 0


def _all_findings() -> list[Finding]:
    with ThreadPoolExecutor(len(apart.AREAS)) as pool:
        accelerator, relay, endpoint = (pool.submit(apart.run, area) for area in ("accelerator", "relay", "endpoint"))
        quick = [list(check()) for check in (settings.tracing, settings.service, settings.environment, runtime.folder)]
        vllm = [*engine.versions(), *engine.targets(), *engine.plugin(), *engine.limits()]
        tracing, service, environment, folder = quick
        return [
            *_python(),
            *accelerator.result(),
            *vllm,
            *tracing,
            *service,
            *environment,
            *folder,
            *relay.result(),
            *running.checks(),
            *endpoint.result(),
        ]


def _python() -> Iterator[Finding]:
    version = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.platform != "linux":
        yield failed(PYTHON, version, "the relay needs Linux")
    elif sys.version_info < _OLDEST:
        yield failed(PYTHON, version, f"use Python {'.'.join(map(str, _OLDEST))} or newer")
    else:
        yield ok(PYTHON, version)
