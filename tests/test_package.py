"""What is built from this tree installs into an environment of its own, and runs there."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from typing import TYPE_CHECKING

import pytest

import otel_npu
from tests.helpers import REPOSITORY

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(not (REPOSITORY / ".git").exists(), reason="this is no checkout of git")


def run(*command: str | Path, folder: Path) -> str:
    done = subprocess.run(list(map(str, command)), cwd=folder, capture_output=True, text=True, timeout=400, check=False)
    if "pip" in command and "Failed to establish a new connection" in done.stderr:
        pytest.skip("no package index is within reach")
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist of what git has, and the wheel that is built from that."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", folder=REPOSITORY)
    for name in filter(None, listed.split("\0")):
        if (REPOSITORY / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, source / name)
    run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", built, folder=source)
    [sdist] = built.glob("*.tar.gz")
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation")
    run(*pip, "--wheel-dir", built, sdist, folder=built)
    return built


@pytest.mark.slow
def test_the_wheel_has_the_package_and_nothing_else(built: Path) -> None:
    [wheel] = built.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"otel_npu", f"otel_npu-{otel_npu.__version__}.dist-info"}
    assert "otel_npu/py.typed" in names
    sources = {str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "otel_npu").rglob("*.py")}
    assert sources <= set(names)


def test_the_sdist_has_what_the_documents_and_tests_need(built: Path) -> None:
    [sdist] = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = ("README.md", "docs/pictures/demo.svg", "tests/conftest.py", "deploy/queries.md", "otel_npu/_native.c")
    assert set(wanted) <= names


@pytest.mark.slow
def test_it_runs_in_an_environment_that_has_nothing_else(built: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "venv", "clean", folder=tmp_path)
    binaries = tmp_path / "clean/bin"
    [wheel] = built.glob("*.whl")
    run(binaries / "python", "-m", "pip", "install", "--quiet", wheel, folder=tmp_path)
    assert run(binaries / "otel-npu", "--version", folder=tmp_path) == f"otel-npu {otel_npu.__version__}\n"
    shown = run(binaries / "python", "-m", "otel_npu", "demo", "--requests", "3", folder=tmp_path)
    assert "all_reduce" in shown
    source = "import otel_npu; assert 'clean' in otel_npu.__file__; otel_npu.enable(); print(otel_npu.flush(60))"
    given = f"import os; os.environ.update(OTEL_TRACES_EXPORTER='none', XDG_RUNTIME_DIR='{tmp_path}'); {source}"
    assert run(binaries / "python", "-c", given, folder=tmp_path) == "True\n"
