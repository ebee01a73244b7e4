"""How long the faults are gone through: in short by `make test`, in full by `make faults`."""

from __future__ import annotations

import os

IN_FULL = os.environ.get("FAULTS") == "full"


def times(short: int, full: int) -> int:
    """How often: in a run in short, or in full."""
    return full if IN_FULL else short
