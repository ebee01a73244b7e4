"""Installed packages, read from their source: nothing of them is imported, so nothing of them runs."""

from __future__ import annotations

import ast
import functools
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Final

from otel_npu import hooks

if TYPE_CHECKING:
    from collections.abc import Iterator

    from otel_npu.hooks import Hook

_FUNCTIONS: Final = (ast.FunctionDef, ast.AsyncFunctionDef)
_MAX_HOPS: Final = 20  # an import may lead back to where it came from


class NoSourceError(Exception):
    """The source that would tell is not there, or can't be understood."""


def installed(package: str) -> bool:
    """Whether a package of this name would be imported."""
    return bool(_folders(package))


def version(package: str) -> str:
    """The version of a package as its own source says it, else as it was installed; empty if unknown."""
    for module in ("_version", "version", "__init__"):
        for folder in _folders(package):
            try:
                tree = _parsed(folder / f"{module}.py")
            except NoSourceError:
                continue
            for node in tree.body:
                if isinstance(node, ast.Assign) and _assigns(node, "__version__") and _is_text(node.value):
                    return str(ast.literal_eval(node.value))
    return hooks.version(package)


def complaint(hook: Hook) -> str | None:
    """What is wrong with a hook's target, or None.

    Raises:
        NoSourceError: Its source does not tell.
    """
    node: ast.AST | None = _module(hook.module)
    if node is None:
        return "is not there: no such module"
    module = hook.module
    for name in hook.target.split("."):
        found = _defined(module, node, name)
        if found is None:
            return "is not there"
        module, node = found
    if not isinstance(node, _FUNCTIONS):
        raise NoSourceError(f"{hook.target} is made while {module} runs")
    arguments = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
    missing = [name for name in hook.parameters if name not in {argument.arg for argument in arguments}]
    return f"does not take {', '.join(missing)}" if missing else None


def _defined(module: str, inside: ast.AST, name: str, hops: int = _MAX_HOPS) -> tuple[str, ast.AST] | None:
    """What a name stands for in a module or class, and the module that it comes from.

    Raises:
        NoSourceError: It may come from where no source can be read.
    """
    if not hops:
        raise NoSourceError(f"{name} is imported in a circle")
    for node in _statements(inside):
        if isinstance(node, (*_FUNCTIONS, ast.ClassDef)) and node.name == name:
            return module, node
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and _assigns(node, name):
            return module, node
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _imported(module, node, alias.name, hops)
    if isinstance(inside, ast.ClassDef):
        return _inherited(module, inside, name, hops)
    return None


def _imported(module: str, node: ast.ImportFrom, name: str, hops: int) -> tuple[str, ast.AST] | None:
    if node.level:  # from the package that the module is in, or one above it
        is_package = _is_package(module)
        parents = module.split(".")
        parents = parents[: len(parents) - node.level + is_package]
        origin = ".".join([*parents, *([node.module] if node.module else [])])
    else:
        origin = node.module or ""
    tree = _module(origin)
    if tree is None:
        raise NoSourceError(f"{name} comes from {origin}, which is not there")
    return _defined(origin, tree, name, hops - 1)


def _inherited(module: str, owner: ast.ClassDef, name: str, hops: int) -> tuple[str, ast.AST] | None:
    tree = _module(module)
    assert tree is not None
    for base in owner.bases:
        plain = base.value if isinstance(base, ast.Subscript) else base
        if not isinstance(plain, ast.Name):
            raise NoSourceError(f"{owner.name} inherits from what its source does not name")
        if plain.id in ("object", "Protocol", "Generic", "ABC"):
            continue
        found = _defined(module, tree, plain.id, hops - 1)
        if found is None or not isinstance(found[1], ast.ClassDef):
            raise NoSourceError(f"{plain.id}, which {owner.name} inherits from, is not to be found")
        member = _defined(*found, name, hops - 1)
        if member is not None:
            return member
    return None


def _statements(inside: ast.AST) -> Iterator[ast.AST]:
    """The statements of a module or class body, those under `if`, `try` and the like included."""
    for node in ast.iter_child_nodes(inside):
        yield node
        if isinstance(node, (ast.If, ast.Try, ast.With, ast.ExceptHandler)):
            yield from _statements(node)


def _assigns(node: ast.Assign | ast.AnnAssign, name: str) -> bool:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return any(isinstance(target, ast.Name) and target.id == name for target in targets)


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


@functools.cache
def _folders(package: str) -> tuple[Path, ...]:
    """Where a package's modules lie. Finding a package at the top imports nothing."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return ()
    return () if spec is None else tuple(Path(folder) for folder in spec.submodule_search_locations or ())


def _module(name: str) -> ast.Module | None:
    """The module's source, parsed; None if there is no such module.

    Raises:
        NoSourceError: It is there, but not as source.
    """
    path = _path(name)
    return None if path is None else _parsed(path)


def _is_package(module: str) -> bool:
    path = _path(module)
    return path is not None and path.name == "__init__.py"


def _path(name: str) -> Path | None:
    package, *parts = name.split(".")
    for folder in _folders(package):
        place = folder.joinpath(*parts)
        for path in (place.with_suffix(".py") if parts else place / "__init__.py", place / "__init__.py"):
            if path.is_file():
                return path
        if parts and any(place.parent.glob(f"{place.name}.*")):
            raise NoSourceError(f"{name} is there without its source")
    return None


@functools.cache
def _parsed(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError) as error:
        raise NoSourceError(f"{path}: {error}") from None
