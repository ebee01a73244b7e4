"""`otel-npu off` and `on`."""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING, Final

from otel_npu.cli.looking import fail, look

if TYPE_CHECKING:
    from collections.abc import Sequence

    from otel_npu.looking.session import Connection

_OBEY_SECONDS: Final = 3.0
_AGAIN_SECONDS: Final = 0.5
_LOOK_SECONDS: Final = 0.05


def quick(word: str, arguments: Sequence[str]) -> int | None:
    """Do what `off` or `on` says; the exit code, or None where the arguments are not those that are usual.

    Whoever says it wants it now, and maybe on a machine that is busy: to import the library that reads the arguments of
    the other commands takes longer than all the rest. What is not read here it reads, or complains of.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--session")
    parser.add_argument("--pid", type=int)
    try:
        chosen, others = parser.parse_known_args(arguments)
    except argparse.ArgumentError:
        return None
    return None if others else switch(chosen.session, chosen.pid, on=word == "on")


def switch(session: str | None, pid: int | None, *, on: bool) -> int:
    """Have all processes of a session capture, or nothing; the exit code: 0 once all have said that they do."""

    def work(connection: Connection) -> int:
        word = "on" if on else "off"
        deadline, again = time.monotonic() + _OBEY_SECONDS, 0.0
        while True:
            if time.monotonic() >= again:  # once more: a process may have been about to connect
                connection.switch(on=on)
                again = time.monotonic() + _AGAIN_SECONDS
            state = connection.ask(seconds=_OBEY_SECONDS)
            others = [process.pid for process in state.processes if process.on != on]
            if not others and not state.silent:
                break
            if time.monotonic() >= deadline:
                silent = f"{state.silent} that have not said who they are" if state.silent else ""
                which = " and ".join(filter(None, [", ".join(map(str, others)), silent]))
                return fail(f"capture is not {word} everywhere: no answer within {_OBEY_SECONDS:.0f} s from {which}")
            time.sleep(_LOOK_SECONDS)
        count = len(state.processes)
        processes = "its only process" if count == 1 else f"all its {count} processes"
        sys.stdout.write(f"capture is {word} in session {connection.session}, in {processes}\n")
        return 0

    return look(work, session, pid)
