"""What `stage()` and `step()` give while tracing is off: nothing happens, and it costs next to nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from otel_npu.capture.decorate import again, decorate

if TYPE_CHECKING:
    from collections.abc import Callable

_F = TypeVar("_F", bound="Callable[..., Any]")


class OffStage:
    """Does nothing as a context manager. As a decorator it asks again at each call, so that enabling later works."""

    __slots__ = ("_attributes", "_name")

    def __init__(self, name: str, attributes: dict[str, Any]) -> None:
        self._name = name
        self._attributes = attributes

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, value: object, traceback: object) -> None:
        pass

    def __call__(self, function: _F) -> _F:
        """Decorate a function, a coroutine function, or a generator function of either kind."""
        return decorate(function, self._name, self._attributes)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy is what `stage()` gives where it is made."""
        return again, (self._name, self._attributes)


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
