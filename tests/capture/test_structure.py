"""Each module of capture depends on those below it alone, types included, and so does the rest of the hot half."""

from __future__ import annotations

import ast
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
    *("resolver", "hang", "idle", "recorder", "switch", "durations"),
)
PACKAGES: Final = ("devices", "wire", "capture", "vllm")


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


@pytest.mark.parametrize(("below", "above"), list(pairwise(PACKAGES)))
def test_a_package_imports_none_above_it(below: str, above: str) -> None:
    upwards = {f"otel_npu.{package}" for package in PACKAGES[PACKAGES.index(above) :]}
    for path in modules(below).values():
        found = {".".join(imported.split(".")[:2]) for imported in imports(path)}
        assert not found & upwards, path
