"""A stage round every call of a function, and round every iteration of a generator."""

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
        """Decorate a function, a coroutine function, or a generator function of either kind."""


class _Maker:
    """Makes stages, on or off as tracing is at the time; `switch`, which knows, puts its way in here."""

    make: Callable[..., Any]


maker = _Maker()


def again(name: str, attributes: dict[str, Any]) -> Any:
    """A stage of this name, whether tracing is on or off now: each call of what is decorated has one of its own."""
    return maker.make(name, **attributes)


def decorate(function: _F, name: str, attributes: dict[str, Any]) -> _F:
    """The function with each call inside a new stage; of a generator the whole of its iteration."""
    return decorate_with(function, functools.partial(again, name, attributes))


def decorate_with(function: _F, new_stage: Callable[[], Any]) -> _F:
    """The same with what this makes as the stage of each call."""
    if inspect.isasyncgenfunction(function):
        return cast("_F", _async_generator(function, new_stage))
    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def staged_coroutine(*args: Any, **kwargs: Any) -> Any:
            with new_stage():
                return await function(*args, **kwargs)

        return cast("_F", staged_coroutine)
    if inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def staged_generator(*args: Any, **kwargs: Any) -> Any:
            with new_stage():
                return (yield from function(*args, **kwargs))

        return cast("_F", staged_generator)

    @functools.wraps(function)
    def staged(*args: Any, **kwargs: Any) -> Any:
        with new_stage():
            return function(*args, **kwargs)

    return cast("_F", staged)


def _async_generator(function: Callable[..., Any], new_stage: Callable[[], Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    async def staged_async_generator(*args: Any, **kwargs: Any) -> Any:
        with new_stage():
            generator = function(*args, **kwargs)
            try:
                value = await generator.__anext__()
                while True:
                    try:
                        sent = yield value
                    except GeneratorExit:
                        await generator.aclose()
                        raise
                    except BaseException as error:
                        value = await generator.athrow(error)
                    else:
                        value = await generator.asend(sent)
            except StopAsyncIteration:
                return

    return staged_async_generator
