"""Checks in a process of their own: with a time limit, and with what a crash leaves behind.

`python -m otel_npu.cli.doctor.apart <area>` is that process. It prints each finding as a line of JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from otel_npu.cli.doctor import accelerator, endpoint, runtime
from otel_npu.cli.doctor.findings import Finding, Status, failed, first_line, warning
from otel_npu.wire.start import APART

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_OUTPUT_BYTES: Final = 1 << 20


@dataclass(frozen=True)
class Area:
    """Checks that run together.

    Attributes:
        checks: Their names, in the order in which they report.
        run: Runs them.
        seconds: How long they may take together.
        slow: Checks that may run out of time without anything being wrong: big imports from a cold disk.
    """

    checks: tuple[str, ...]
    run: Callable[[], Iterator[Finding]]
    seconds: float
    slow: tuple[str, ...] = ()


AREAS: Final = {
    "accelerator": Area(accelerator.CHECKS, accelerator.checks, 12.5, slow=(accelerator.TORCH, accelerator.TORCH_NPU)),
    "relay": Area((runtime.RELAY,), runtime.relay, 12.0),
    "endpoint": Area((endpoint.ENDPOINT,), endpoint.checks, 12.0),
}


def run(name: str) -> list[Finding]:
    """The findings of an area. What its process did not get to say is said for it."""
    area = AREAS[name]
    package_root = str(Path(__file__).parents[3])
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), package_root)))
    # Files without a name, not pipes: a grandchild may hold them open after the time is up.
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(  # noqa: S603
            [sys.executable, "-W", "ignore", "-m", __name__, name],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            env=environment,
            **APART,
        )
        try:
            code = process.wait(area.seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what it has started, too
            process.wait()
        said = _text(output.fileno()).splitlines()
        complaint = next((line for line in reversed(_text(errors.fileno()).splitlines()) if line.strip()), "")
    findings = [_finding(line) for line in said]
    return [*findings, *_unsaid(area, findings, code, complaint)]


def _unsaid(area: Area, findings: list[Finding], code: int | None, complaint: str) -> Iterator[Finding]:
    said = {finding.check for finding in findings}
    silent = [check for check in area.checks if check not in said]
    if not silent:
        return
    first, *rest = silent
    if code is None:
        found = f"no answer within {area.seconds:.0f} s"
        cure = "run it again when the machine is less busy"
        yield warning(first, found, cure) if first in area.slow else failed(first, found, cure)
    else:
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        yield failed(first, f"its process ended {how}", first_line(complaint) if complaint else "")
    for check in rest:
        yield warning(check, f"not checked, for {first} did not get that far")


def _text(descriptor: int) -> str:
    return os.pread(descriptor, _OUTPUT_BYTES, 0).decode(errors="replace")


def _finding(line: str) -> Finding:
    fields = json.loads(line)
    return Finding(**{**fields, "status": Status(fields["status"])})


def main() -> None:
    """Run the area that the argument names."""
    # What libraries print belongs to stderr; stdout is for findings alone.
    with os.fdopen(os.dup(1), "w") as findings:
        os.dup2(2, 1)
        for finding in AREAS[sys.argv[1]].run():
            findings.write(json.dumps(asdict(finding)) + "\n")
            findings.flush()
        sys.stdout.flush()
        # Past the interpreter's exit, in which a device's runtime may hang or crash when all has been said.
        os._exit(0)


if __name__ == "__main__":
    main()
