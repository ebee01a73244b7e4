"""What `stage()` and `step()` give while tracing is off: nothing happens, and it costs next to nothing."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, TypeVar

from otel_npu.capture.decorate import decorate

if TYPE_CHECKING:
    from collections.abc import Callable

_F = TypeVar("_F", bound="Callable[..., Any]")


class OffStage:
    """Does nothing as a context manager. As a decorator it asks again at each call, so that enabling later works."""

    __slots__ = ("_again", "_attributes", "_name")

    def __init__(self, again: Callable[..., Any], name: str, attributes: dict[str, Any]) -> None:
        self._again = again
        self._name = name
        self._attributes = attributes

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, value: object, traceback: object) -> None:
        pass

    def __call__(self, function: _F) -> _F:
        """Decorate a function or coroutine function."""
        return decorate(function, functools.partial(self._again, self._name, **self._attributes))


class OffStep:
    """Does nothing."""

    __slots__ = ()

    def open(self) -> OffStep:
        """Do nothing."""
        return self

    def close(self, error: type[BaseException] | None = None) -> None:
        """Do nothing."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass
