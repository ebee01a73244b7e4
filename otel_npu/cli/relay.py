"""`otel-npu relay`: the relay in a process, or a container, of its own."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import typer

from otel_npu.settings import SESSION


def run(*, wait: bool) -> NoReturn:
    """Become the relay.

    Args:
        wait: Whether to wait for the end of a relay that serves the session already.

    Raises:
        typer.Exit: There is no session to serve.
    """
    session = os.environ.get(SESSION, "")
    if not session:
        # Without one the relay would make up a session that no program knows of.
        typer.echo(f"{SESSION} is not set: give this relay and the programs to trace the same value", err=True)
        raise typer.Exit(2)
    typer.echo(
        f"relay of session {session!r}, process {os.getpid()}: ends on SIGTERM, when everything is sent", err=True
    )
    sys.stdout.flush()
    sys.stderr.flush()
    # In place of this process: signals reach the relay itself, and the command line's own modules are gone from
    # its memory. The working directory must not shadow modules.
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-m", "otel_npu.relay", *(["--wait"] if wait else [])]
    os.execve(sys.executable, command, environment)  # noqa: S606
