"""Which trace a step belongs to, and which requests it is linked to."""

from __future__ import annotations

import contextvars
import re
import sys
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from otel_npu.ids import new_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

_MAX_KINDS: Final = 64
# Version ff is none, and version 00 ends after the flags; what a later one adds there is not for us.
_TRACEPARENT: Final = re.compile(r"(?!ff)(?!00.{53}.)[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
SAMPLED: Final = 0x01

open_step: contextvars.ContextVar[Any] = contextvars.ContextVar("otel_npu.step", default=None)
"""The innermost step that was opened here. Of the context, not of the thread: tasks that share a thread have steps of
their own. It may be closed by now; then the steps around it count."""


class Ids(NamedTuple):
    """The ids of a step, and whether it is kept as a trace: one that is not may turn out to be slow, and be kept then.

    Raw bytes; an empty parent makes it a root.
    """

    trace_id: bytes
    span_id: bytes
    parent_span_id: bytes
    kept: bool = True


NO_IDS: Final = Ids(b"", b"", b"", kept=False)


class Rank(NamedTuple):
    """Which of an engine's workers a step ran on, and whether that one's output is what the engine waits for."""

    number: int
    returns_output: bool


NO_RANK: Final[Rank] = Rank(-1, returns_output=False)


def new_root(*, kept: bool = True) -> Ids:
    """Ids of a new trace."""
    ids = new_bytes(24)
    return Ids(ids[:16], ids[16:], b"", kept)


def child_of(trace_id: bytes, parent_span_id: bytes, *, kept: bool = True) -> Ids:
    """Ids of a new span in an existing trace."""
    return Ids(trace_id, new_bytes(8), parent_span_id, kept)


class Limiter:
    """Lets so many steps a second pass, of each kind, so that a rare kind is seen beside a frequent one."""

    def __init__(self, per_second: float, now: Callable[[], int] = perf_counter_ns) -> None:
        self._now = now
        self.dues: dict[str, int] = {}
        """By kind: when the next one is due, should they come evenly."""
        # One may come so much early: as many at once as a second allows. None ever may where there are none a second.
        self.interval_ns = round(1e9 / per_second) if per_second else 0
        self.slack_ns = round((max(1.0, min(per_second, 1e9)) - 1) * self.interval_ns) if per_second else -(1 << 62)

    def allow(self, kind: str) -> bool:
        """Whether a step of this kind may be a trace now."""
        now = self._now()
        due = self.dues.get(kind)
        if due is None:
            due = 0 if self.slack_ns >= 0 else 1 << 62
            if len(self.dues) >= _MAX_KINDS:
                kind = ""  # the many share one allowance
                due = self.dues.get(kind, due)
        if due - now > self.slack_ns:
            return False
        self.dues[kind] = max(due, now) + self.interval_ns
        return True


def active_span() -> Any:
    """The span context that the program's own OpenTelemetry has active here, or None."""
    trace = sys.modules.get("opentelemetry.trace")
    if trace is None:
        return None
    try:
        span_context = trace.get_current_span().get_span_context()
    except Exception:
        return None
    return span_context if span_context.is_valid else None


def header_text(value: Any) -> Any:
    """A header's name or value as text, which ASGI gives as bytes; anything else as it is."""
    return value.decode("latin-1") if isinstance(value, bytes) else value


def link(request: Any) -> bytes | None:
    """A request as a link: trace id, span id, flags, 25 bytes. None if it is not one.

    Args:
        request: A W3C traceparent (bytes too, as ASGI gives headers), an OpenTelemetry span context, or a span.
    """
    request = header_text(request)
    if isinstance(request, str):
        match = _TRACEPARENT.fullmatch(request.strip())
        if match is None or match[1] == "0" * 32 or match[2] == "0" * 16:
            return None
        return bytes.fromhex(match[1] + match[2] + match[3])
    try:
        span_context = request.get_span_context() if hasattr(request, "get_span_context") else request
        ids: bytes = span_context.trace_id.to_bytes(16, "big") + span_context.span_id.to_bytes(8, "big")
        return ids + bytes([span_context.trace_flags & 0xFF]) if span_context.is_valid else None
    except Exception:  # whatever somebody's own class does, it is no link
        return None
