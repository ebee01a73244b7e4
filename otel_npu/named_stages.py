"""Functions that the environment makes stages: `OTEL_NPU_STAGES=module:qualname=name,...`."""

from __future__ import annotations

import functools
import inspect
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from otel_npu import hooks
from otel_npu.capture.decorate import decorate_with, maker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from otel_npu.settings import NamedStage


class _Opener:
    """Opens the stage of a name: a program's like any other, unless an engine's plugin knows better."""

    open: Callable[[str], Any] | None = None


_opener = _Opener()


def install(named: Iterable[NamedStage], opener: Callable[[str], Any] | None = None) -> None:
    """Make these functions stages, now or as soon as their modules have been imported. Never raises.

    Args:
        named: The functions.
        opener: Makes the stage of a name; without it they are stages as `stage()` makes them.
    """
    if opener is not None:
        _opener.open = opener
    hooks.install(
        hooks.Hook(stage.module.partition(".")[0], stage.module, stage.qualname, _Staged(stage.name)) for stage in named
    )


@dataclass(frozen=True)
class _Staged:
    """Puts a stage of this name round a function; equal ones are one, so that none is put in twice."""

    name: str

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        staged = decorate_with(function, functools.partial(_open, self.name))
        torch = sys.modules.get("torch")
        if torch is None or inspect.iscoroutinefunction(function):
            return staged
        is_compiling = torch.compiler.is_compiling

        def call(*args: Any, **kwargs: Any) -> Any:
            # What is compiled has no stages inside; a compiler that met one would give up, or break the model.
            return function(*args, **kwargs) if is_compiling() else staged(*args, **kwargs)

        return call


def _open(name: str) -> Any:
    return maker.make(name) if _opener.open is None else _opener.open(name)
