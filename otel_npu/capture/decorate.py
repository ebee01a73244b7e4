"""A stage round every call of a function."""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any, TypeVar, cast

if TYPE_CHECKING:
    from collections.abc import Callable

_F = TypeVar("_F", bound="Callable[..., Any]")


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
