"""A stage round every call of a function."""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

_F = TypeVar("_F", bound="Callable[..., Any]")


class AnyStage(Protocol):
    """What `stage()` gives, on or off. One type, not a union: type checkers take no union for a decorator."""

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None, /
    ) -> None: ...

    def __call__(self, function: _F, /) -> _F:
        """Decorate a function or coroutine function."""


def decorate(function: _F, new_stage: Callable[[], Any]) -> _F:
    """The function, or coroutine function, with each call inside a new stage."""
    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def staged_coroutine(*args: Any, **kwargs: Any) -> Any:
            with new_stage():
                return await function(*args, **kwargs)

        return cast("_F", staged_coroutine)

    @functools.wraps(function)
    def staged(*args: Any, **kwargs: Any) -> Any:
        with new_stage():
            return function(*args, **kwargs)

    return cast("_F", staged)
