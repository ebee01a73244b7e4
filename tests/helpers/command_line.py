"""The command `otel-npu`, as a person calls it."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

COMMAND: Final = str(Path(sys.executable).with_name("otel-npu"))


def otel_npu_command(*arguments: str, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run it to its end."""
    return subprocess.run(
        [COMMAND, *arguments],
        env={**os.environ, "PYTHONIOENCODING": "utf-8", **(environment or {})},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def start_command(*arguments: str, environment: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """Start it, with all that it prints on one pipe."""
    return subprocess.Popen(
        [COMMAND, *arguments],
        env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def line_of(process: subprocess.Popen[str]) -> str:
    """The next line that the process prints, within 120 s."""
    assert process.stdout is not None
    assert select.select([process.stdout], [], [], 120)[0], "no line came"
    return process.stdout.readline()
