"""`otel-npu top`: what a running session does, a screen a second."""

from __future__ import annotations

import json as json_module
import os
import sys
import time
from typing import TYPE_CHECKING, Any, Final

from rich.console import Console
from rich.live import Live

from otel_npu.cli.keys import Keys
from otel_npu.cli.looking import look
from otel_npu.cli.top_screen import SORTS, draw
from otel_npu.looking.follow import Follower
from otel_npu.looking.tally import Tally, summary
from otel_npu.wire.looking import Seen

if TYPE_CHECKING:
    from otel_npu.looking.session import Connection

ONCE_SECONDS: Final = 3.0
_RESOLVED_NS: Final = 300_000_000
"""So long after a step has ended the relay has read of it."""
_SCREEN_SECONDS: Final = 1.0
_KEY_SECONDS: Final = 0.1
_FILE_COLUMNS: Final = 120


def run(session: str | None, pid: int | None, *, once: bool, json: bool) -> int:
    """Show it until `q`; or one table, of three seconds; the exit code."""
    os.nice(5)  # the model goes first

    def work(connection: Connection) -> int:
        top = Top(connection)
        if json or once or not sys.stdout.isatty():
            top.watch(ONCE_SECONDS + _RESOLVED_NS * 1e-9)
            found = top.found()
            if json:
                sys.stdout.write(json_module.dumps(found, indent=2) + "\n")
            else:
                console = Console(highlight=False)
                console.width = console.width if console.is_terminal else _FILE_COLUMNS
                console.print(draw(found, console.width))
        else:
            _live(top)
        return 0

    return look(work, session, pid)


class Top:
    """What is known of a session, and what its viewer has chosen to see.

    Args:
        connection: To the session.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._tally = Tally(time.perf_counter_ns())
        self._follower = Follower(self._tally.process)
        self.sort = SORTS[0]
        self.rank: int | None = None
        self.frozen = False
        self.done = False
        connection.ask(follow=True)

    def watch(self, seconds: float) -> None:
        """Follow it for so long."""
        for view in self._connection.views(seconds):
            if isinstance(view, Seen):
                self._follower.take(view)
        self._follower.tick()

    def found(self) -> dict[str, Any]:
        """All figures, as they are now."""
        asked_ns = time.perf_counter_ns()
        state = self._connection.ask()
        self.watch(0.0)  # what has come before the answer
        self._tally.upto_ns = asked_ns - _RESOLVED_NS
        return {
            "session": self._connection.session,
            "processes": len(state.processes),
            "on": sum(process.on for process in state.processes),
            "until": round(time.time() - (time.perf_counter_ns() - self._tally.window()[2]) * 1e-9, 3),
            **summary(self._tally, self.rank),
            "dropped": state.dropped,
            "unseen_packets": state.unseen,
        }

    def press(self, key: str, ranks: list[int]) -> None:
        """Do what a key says."""
        if key == "q":
            self.done = True
        elif key == "s":
            self.sort = SORTS[(SORTS.index(self.sort) + 1) % len(SORTS)]
        elif key in ("f", " "):
            self.frozen = not self.frozen
        elif key == "r":
            choices = [None, *ranks]
            self.rank = choices[(choices.index(self.rank) + 1) % len(choices)] if self.rank in choices else None


def _live(top: Top) -> None:
    console = Console(highlight=False)
    found = top.found()
    with Keys() as keys, Live(console=console, screen=True, auto_refresh=False) as live:
        next_screen = 0.0
        while not top.done:
            pressed = keys.take()
            for key in pressed:
                top.press(key, [row["rank"] for row in found["ranks"] if row["rank"] is not None])
            if pressed or (time.monotonic() >= next_screen):
                if not top.frozen:
                    found = top.found()
                    next_screen = time.monotonic() + _SCREEN_SECONDS
                live.update(
                    draw(found, console.width, sort=top.sort, rank=top.rank, frozen=top.frozen, keys=True),
                    refresh=True,
                )
            top.watch(_KEY_SECONDS)
