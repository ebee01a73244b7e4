"""What a check says."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Status(str, enum.Enum):
    """How a check came out; the values are those of `--json`."""

    OK = "ok"
    FAILED = "failed"
    WARNING = "warning"
    """Worth a look, or it could not be checked."""
    NOT_APPLICABLE = "not_applicable"


@dataclass(frozen=True)
class Finding:
    """One line of the screen.

    Attributes:
        check: Which check; some say several things.
        status: How it came out.
        found: What was found.
        cure: What to do about it; empty where there is nothing to do.
    """

    check: str
    status: Status
    found: str
    cure: str = ""


def ok(check: str, found: str) -> Finding:
    """It is as it should be."""
    return Finding(check, Status.OK, found)


def failed(check: str, found: str, cure: str) -> Finding:
    """Tracing won't work as it is meant to."""
    return Finding(check, Status.FAILED, found, cure)


def warning(check: str, found: str, cure: str = "") -> Finding:
    """It may be meant so, or it could not be checked."""
    return Finding(check, Status.WARNING, found, cure)


def not_applicable(check: str, found: str) -> Finding:
    """There is nothing to check here."""
    return Finding(check, Status.NOT_APPLICABLE, found)


def first_line(error: object) -> str:
    """An error in one line that fits the screen."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200]
