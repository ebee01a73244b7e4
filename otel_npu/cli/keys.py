"""Keys as they are pressed, without a line's end, while a screen is shown."""

from __future__ import annotations

import os
import select
import sys
import termios
import tty
from typing import Any


class Keys:
    """Reads keys of the terminal from which the command is run; none where there is no terminal."""

    def __init__(self) -> None:
        self._before: list[Any] | None = None

    def __enter__(self) -> Keys:
        if sys.stdin.isatty():
            self._before = termios.tcgetattr(sys.stdin)
            tty.setcbreak(sys.stdin)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, self._before)

    def take(self) -> str:
        """The keys since the last call."""
        pressed = ""
        while self._before is not None and select.select([sys.stdin], [], [], 0)[0]:
            more = os.read(sys.stdin.fileno(), 64)
            if not more:
                return pressed + "q"  # the terminal has gone
            pressed += more.decode(errors="ignore")
        return pressed
