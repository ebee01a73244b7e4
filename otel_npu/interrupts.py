"""Tells the program's exceptions from faults of ours.

Python runs signal handlers between any two of our lines. What one raises (a soft time limit, an interrupt) is the
program's, and goes on to it, wherever it strikes.
"""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import CodeType, FrameType, TracebackType


def from_outside(error: BaseException | None) -> bool:
    """Whether an exception that struck in the midst of our lines is the program's, to be raised again.

    What is no `Exception` always is. Any other is if it came by way of a signal handler, which is called with the
    frame that it interrupts, and not by us.
    """
    if not isinstance(error, Exception):
        return error is not None
    below: FrameType | None = None
    handlers: set[CodeType] | None = None
    traceback: TracebackType | None = error.__traceback__
    while traceback is not None:
        frame = traceback.tb_frame
        if below is not None:
            handlers = _handlers() if handlers is None else handlers
            if frame.f_code in handlers or _was_given(frame, below):
                return True
        below = frame
        traceback = traceback.tb_next
    return False


def _was_given(frame: FrameType, below: FrameType) -> bool:
    return any(
        value is below or (type(value) is tuple and any(item is below for item in value))
        for value in frame.f_locals.values()
    )


def _handlers() -> set[CodeType]:
    codes = {_code(signal.getsignal(number)) for number in signal.valid_signals()}
    return {code for code in codes if code is not None}


def _code(handler: Any) -> CodeType | None:
    code: CodeType | None = getattr(getattr(handler, "__func__", handler), "__code__", None)
    return code
