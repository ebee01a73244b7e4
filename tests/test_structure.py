"""Who depends on whom, types included: modules in no circle, packages and the modules of capture in one order."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from itertools import pairwise
from typing import TYPE_CHECKING, Final

import pytest

from tests.helpers import REPOSITORY

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ROOT: Final = REPOSITORY / "otel_npu"

# From what a stage is to who turns it on; a reader follows a stage from right to left once, and never comes back.
ORDER: Final = (
    *("context", "arguments", "plain", "records", "shared", "decorate", "off", "steps", "stages"),
    *("resolver", "hang", "link", "idle", "recorder", "switch", "durations"),
)
PACKAGES: Final = ("devices", "wire", "relay", "capture", "vllm")


def imports(path: Path) -> Iterator[str]:
    """What a module imports of ours, wherever it does, as dotted names."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("otel_npu"):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("otel_npu"))


def modules(package: str) -> dict[str, Path]:
    return {path.stem: path for path in (ROOT / package).rglob("*.py") if path.stem != "__init__"}


def test_every_module_of_capture_has_its_place() -> None:
    assert set(ORDER) >= set(modules("capture"))


@pytest.mark.parametrize("name", modules("capture"))
def test_a_module_of_capture_imports_only_what_is_below_it(name: str) -> None:
    above = ORDER[ORDER.index(name) + 1 :]
    found = {part for imported in imports(modules("capture")[name]) for part in imported.split(".")[2:3]}
    assert not found & set(above)


def test_no_modules_import_each_other_in_a_circle() -> None:
    paths = {".".join(path.relative_to(REPOSITORY).with_suffix("").parts): path for path in ROOT.rglob("*.py")}
    modules = {name.removesuffix(".__init__"): path for name, path in paths.items()}
    order = TopologicalSorter({name: _imported(path, set(modules)) - {name} for name, path in modules.items()})
    order.prepare()  # CycleError names one


def _imported(path: Path, modules: set[str]) -> set[str]:
    """Which modules one imports: of a package's own only what is not in a module of it."""
    found = [name for name in imports(path) if name in modules]
    return {name for name in found if not any(other.startswith(f"{name}.") for other in found)}


@pytest.mark.parametrize(("below", "above"), list(pairwise(PACKAGES)))
def test_a_package_imports_none_above_it(below: str, above: str) -> None:
    upwards = {f"otel_npu.{package}" for package in PACKAGES[PACKAGES.index(above) :]}
    for path in modules(below).values():
        found = {".".join(imported.split(".")[:2]) for imported in imports(path)}
        assert not found & upwards, path
