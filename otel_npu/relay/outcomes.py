"""What became of an export, as far as it decides what to do next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from otel_npu import semconv


@dataclass(frozen=True)
class Taken:
    """The receiver has the spans, but for so many that it rejected."""

    rejected: int = 0
    message: str = ""


@dataclass(frozen=True)
class Later:
    """Not now, but it may come to be: after so many seconds, if the receiver says when."""

    error: str
    after_seconds: float | None = None


@dataclass(frozen=True)
class TooLarge:
    """Too many bytes at once."""

    error: str


@dataclass(frozen=True)
class Never:
    """The spans are lost, for this reason of `semconv.DROP_REASONS`. Without an error it has been logged already."""

    error: str = ""
    reason: str = semconv.EXPORT_REFUSED


Outcome: TypeAlias = Taken | Later | TooLarge | Never
