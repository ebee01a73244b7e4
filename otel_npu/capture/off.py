"""What `stage()` and `step()` give while tracing is off: nothing happens, and it costs next to nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from otel_npu.capture.decorate import decorate

if TYPE_CHECKING:
    from collections.abc import Callable

_F = TypeVar("_F", bound="Callable[..., Any]")


class OffStage:
    """Does nothing as a context manager. As a decorator it asks again at each call, so that enabling later works."""

    __slots__ = ("_again",)

    def __init__(self, again: Callable[[], Any]) -> None:
        self._again = again

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass

    def __call__(self, function: _F) -> _F:
        return decorate(function, self._again)


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
