"""What all commands share that look at a running session: its choice, and errors as one line."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING

from otel_npu.looking.session import Connection, LookError, connect

if TYPE_CHECKING:
    from collections.abc import Callable

INTERRUPTED = 130


def look(work: Callable[[Connection], int], session: str | None, pid: int | None) -> int:
    """Connect and work; the exit code, 1 after an error, which is one line."""
    try:
        with connect(session, pid) as connection:
            return work(connection)
    except LookError as error:
        return fail(str(error))
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # whoever read has gone
        with contextlib.suppress(OSError):
            sys.stdout.close()
        return 1


def fail(text: str) -> int:
    """Say what is wrong; the exit code."""
    sys.stderr.write(f"otel-npu: {text}\n")
    return 1
