"""The relays that run here for this user's programs, such as a server's: their environment tells where they send."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from otel_npu.announce import destination
from otel_npu.cli.doctor.findings import Finding, ok

if TYPE_CHECKING:
    from collections.abc import Iterator

RUNNING: Final = "running relay"

OWN: Final = "_OTEL_NPU_DOCTOR"
"""Marks the relay that the doctor itself starts, to see whether one can be."""
_FOLDER: Final = "XDG_RUNTIME_DIR"


class RunningRelay(NamedTuple):
    """One relay: its process, and the variables that it was started with."""

    pid: int
    environment: dict[str, str]


def relays() -> Iterator[RunningRelay]:
    """The relays whose sockets lie where a program that is started here would look for one."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            if b"\0-m\0otel_npu.relay\0" not in (entry / "cmdline").read_bytes():
                continue
            pairs = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
        except OSError:  # it has gone, or is somebody else's
            continue
        environment = {name: value for name, equals, value in (pair.partition("=") for pair in pairs) if equals}
        if OWN not in environment and environment.get(_FOLDER, "") == os.environ.get(_FOLDER, ""):
            yield RunningRelay(int(entry.name), environment)


def checks() -> Iterator[Finding]:
    """Where each of them sends; nothing if there is none."""
    for relay in relays():
        yield ok(RUNNING, f"process {relay.pid} sends to {destination(relay.environment)}")
