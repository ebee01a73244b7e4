"""`otel-npu doctor` as a person or a script runs it, and the surroundings that it is to see through."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tests.helpers import REPOSITORY

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from otel_npu.hooks import Hook

# What a test is not about is not looked at: torch takes seconds to import, and a receiver has to be there.
QUICK: Final = {"OTEL_NPU_DEVICE": "cpu", "OTEL_TRACES_EXPORTER": "none"}
# What the tests set for themselves, and whom this machine trusts.
NOT_INHERITED: Final = ("TORCH_DEVICE_BACKEND_AUTOLOAD", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")

# Its limits are for a person who waits. On a machine that does other things too what is slow is not broken.
_PATIENT: Final = """
import dataclasses
from otel_npu.cli import main
from otel_npu.cli.doctor import apart
apart.AREAS |= {name: dataclasses.replace(area, seconds=20 * area.seconds) for name, area in apart.AREAS.items()}
main()
"""


@dataclass(frozen=True)
class Report:
    """What a run of the doctor said."""

    code: int
    output: str
    checks: list[dict[str, str]]

    def __getitem__(self, check: str) -> dict[str, str]:
        """The first finding of a check."""
        return next(finding for finding in self.checks if finding["check"] == check)

    def all_of(self, check: str) -> list[dict[str, str]]:
        return [finding for finding in self.checks if finding["check"] == check]


def doctor(
    environment: Mapping[str, str] | None = None, *, python: str = sys.executable, cwd: Path | None = None
) -> Report:
    """Run it with `--json`."""
    done = run_doctor("--json", environment=environment, python=python, cwd=cwd)
    report: dict[str, Any] = json.loads(done.stdout)
    assert done.stderr == ""
    assert report["ok"] is (done.returncode == 0)
    return Report(done.returncode, done.stdout, report["checks"])


def run_doctor(
    *arguments: str,
    environment: Mapping[str, str] | None = None,
    python: str = sys.executable,
    cwd: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run it in a process of its own."""
    inherited = {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}
    given = environment or {}
    paths = (given.get("PYTHONPATH", ""), str(REPOSITORY))
    return subprocess.run(
        [python, "-c", _PATIENT, "doctor", *arguments],
        env={
            **inherited,
            "PYTHONIOENCODING": "utf-8",
            **given,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        },
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def assert_red(finding: dict[str, str], found: str, cure: str) -> None:
    """It failed, and says these words of what is wrong and of its cure."""
    assert finding["status"] == "failed", finding
    assert found in finding["found"]
    assert cure in finding["cure"]


def environment_without(folder: Path, *packages: str) -> str:
    """The Python of a virtual environment that has all that this one has but for these packages."""
    venv.create(folder, symlinks=True, with_pip=False)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    ours, theirs = Path(sysconfig.get_path("purelib")), folder / "lib" / version / "site-packages"
    for entry in ours.iterdir():
        name = entry.name.partition("-")[0].partition(".")[0]
        if name not in packages and not (theirs / entry.name).exists():
            (theirs / entry.name).symlink_to(entry)
    return str(folder / "bin" / "python")


def write_modules(folder: Path, modules: Mapping[str, str]) -> Path:
    """Put packages of these modules into a folder."""
    for name, source in modules.items():
        path = folder.joinpath(*name.split("."))
        path.parent.mkdir(parents=True, exist_ok=True)
        is_package = any(other.startswith(f"{name}.") for other in modules) or "." not in name
        file = path / "__init__.py" if is_package else path.with_suffix(".py")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source)
        for parent in path.parents:
            if parent == folder:
                break
            (parent / "__init__.py").touch()
    return folder


def targets_of(hooks: Iterable[Hook], version: str) -> dict[str, str]:
    """Modules that have all that these hooks need and, where one is imported, fail."""
    functions: dict[str, dict[str, list[str]]] = {}
    packages = set()
    for hook in hooks:
        packages.add(hook.package)
        owner, _, name = hook.target.rpartition(".")
        arguments = ["self"] * bool(owner) + list(hook.parameters)
        functions.setdefault(hook.module, {}).setdefault(owner, []).append(f"def {name}({', '.join(arguments)}): ...")
    modules = dict.fromkeys(packages, "raise RuntimeError('the doctor must not import this')\n")
    modules |= {f"{package}._version": f"__version__ = version = {version!r}\n" for package in packages}
    for module, owners in functions.items():
        lines = [line for owner, lines in owners.items() if not owner for line in lines]
        for owner, methods in owners.items():
            if owner:
                lines += [f"class {owner}:", *(f"    {method}" for method in methods)]
        modules[module] = "\n".join(lines) + "\n"
    return modules
