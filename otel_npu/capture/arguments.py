"""What the program says of a stage or a step, as it was when it was said: a list may change while the device works."""

from __future__ import annotations

import enum
import functools
import logging
import os
from typing import TYPE_CHECKING, Any, Final

from otel_npu import semconv

if TYPE_CHECKING:
    from collections.abc import Iterable

    from otel_npu.drops import Drops
    from otel_npu.wire.frames import AttributeValue

_log = logging.getLogger("otel_npu")

MAX_NAME: Final = 256  # characters of a name or a kind
MAX_TEXT: Final = 4096  # characters of an attribute
MAX_ITEMS: Final = 1024  # of a list in an attribute
_MAX_NAMES: Final = 4096  # different ones that are remembered
_INT64: Final = 1 << 63
_PLAIN: Final = frozenset({str, bool, int, float})
_named: set[str] = set()
"""Attributes that the log has named as left out. A few: it is for whoever looks, the counts are for all."""
_MAX_NAMED: Final = 16


def no_name(name: object) -> None:
    """Refuse what is surely a mistake in the program's text.

    Raises:
        TypeError: A function stands in the place of a stage's name.
    """
    if callable(name) and not isinstance(name, type):
        raise TypeError('stage() takes a name first: @otel_npu.stage("forward")')


def no_kind(kind: object) -> None:
    """Refuse what is surely a mistake in the program's text.

    Raises:
        TypeError: A function stands in the place of a step's kind: a step is no decorator.
    """
    if callable(kind) and not isinstance(kind, type):
        raise TypeError('step() decorates no function, it goes round one pass of a loop: with otel_npu.step("decode"):')


def text(name: object) -> str:
    """A name or a kind as text that can be sent: plain, encodable and of bounded length."""
    return _cut(name if type(name) is str else _as_text(name))


@functools.lru_cache(_MAX_NAMES)
def _cut(name: str) -> str:
    cut = name[:MAX_NAME]
    return cut if cut.isascii() else cut.encode(errors="replace").decode()


def _as_text(name: object) -> str:
    try:
        if isinstance(name, enum.Enum):
            return _as_text(name.value if isinstance(name.value, str | bytes) else name.name)
        if isinstance(name, str):  # a subclass, such as numpy's
            return str.__str__(name)
        if isinstance(name, bytes):
            return name.decode(errors="replace")
        if isinstance(name, int | float):
            return repr(name)
    except Exception:  # whatever somebody's own class does
        _log.debug("a name could not be read", exc_info=True)
    return type(name).__name__


def requests(given: Iterable[Any]) -> tuple[Any, ...]:
    """The requests of a step, as they are now.

    Raises:
        TypeError: It is a text, or nothing that can be iterated over.
    """
    try:
        each = None if isinstance(given, str | bytes) else iter(given)
    except TypeError:
        each = None
    if each is None:
        raise TypeError(f"requests takes a list of requests, not {type(given).__name__}: requests=[traceparent]")
    return tuple(each)


def attributes(given: dict[str, Any], drops: Drops) -> dict[str, AttributeValue]:
    """The attributes as they are now; what no span can carry is left out, counted, and named in the log once."""
    taken: dict[str, AttributeValue] = {}
    for key, value in given.items():
        clean = _clean(value)
        if clean is None:
            drops.add(semconv.BAD_ATTRIBUTE)
            if key not in _named and len(_named) < _MAX_NAMED:
                _named.add(key)
                _log.warning(
                    "attribute %r is left out: a %s is nothing that a span can carry", key, type(value).__name__
                )
        else:
            taken[text(key)] = clean
    return taken


def _clean(value: Any) -> AttributeValue | None:
    """The value if a span can carry it. `str()` of anything else is not tried: of a tensor it waits for the device."""
    try:
        plain = _plain(value)
    except Exception:  # whatever somebody's own class does
        return None
    if not isinstance(plain, list):
        return plain  # type: ignore[no-any-return]
    items = [_clean(item) for item in plain[:MAX_ITEMS]]
    kinds = {type(item) for item in items}
    if kinds == {int, float}:
        return [float(item) for item in items]  # type: ignore[arg-type]
    return items if len(kinds) <= 1 and not kinds & {list, type(None)} else None  # type: ignore[return-value]


def _plain(value: Any) -> Any:  # noqa: PLR0911 (a line for each kind)
    """A string, a number, a flag or a list, where the value has just one such meaning; else None."""
    if isinstance(value, enum.Enum) and type(value.value) in _PLAIN:
        value = value.value
    if isinstance(value, str):
        cut = str.__str__(value)[:MAX_TEXT]
        return cut if cut.isascii() or _encodable(cut) else None
    if isinstance(value, bool):
        return value
    if isinstance(value, float):  # numpy's float64 is one
        return float(value)
    if isinstance(value, int):
        return int(value) if -_INT64 <= value < _INT64 else None
    if isinstance(value, list | tuple):
        return list(value)
    if isinstance(value, os.PathLike):
        return _plain(os.fspath(value))
    return _from_array(value)


def _from_array(value: Any) -> Any:
    """A scalar or a short row of numpy's or, if it is on the host, torch's: to read another would wait for a device."""
    root = type(value).__module__.partition(".")[0]
    if root not in ("numpy", "torch") or not hasattr(value, "tolist"):
        return None
    device = getattr(value, "device", "cpu")
    if getattr(device, "type", device) != "cpu" or value.ndim > 1 or (value.ndim == 1 and len(value) > MAX_ITEMS):
        return None
    return _plain(value.tolist())


def _encodable(given: str) -> bool:
    try:
        given.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True
