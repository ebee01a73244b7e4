"""A span's links as they come in a frame: a batch of a thousand requests is a thousand of them on every step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opentelemetry.sdk.util import BoundedList
from opentelemetry.trace import Link, SpanContext, TraceFlags

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


class Links(BoundedList[Link]):
    """Links that are made into objects only for whoever looks at them; the encoder takes them as they are.

    Args:
        maxlen: How many are kept at most, the last ones; None for all.
        raw: Each as it is in a frame: trace id, span id, trace flags.
    """

    def __init__(self, maxlen: int | None, raw: Iterable[bytes]) -> None:
        super().__init__(maxlen)
        self.raw = list(raw)
        if maxlen is not None and len(self.raw) > maxlen:
            self.dropped = len(self.raw) - maxlen
            del self.raw[: self.dropped]

    def __len__(self) -> int:
        return len(self.raw)

    def __bool__(self) -> bool:
        """Whether there are any, or were: of those beyond the limit the number is told."""
        return bool(self.raw or self.dropped)

    def __getitem__(self, index: int) -> Link:  # type: ignore[override]
        return _link(self.raw[index])

    def __iter__(self) -> Iterator[Link]:
        return map(_link, self.raw)


def _link(raw: bytes) -> Link:
    return Link(
        SpanContext(
            int.from_bytes(raw[:16], "big"),
            int.from_bytes(raw[16:24], "big"),
            is_remote=True,
            trace_flags=TraceFlags(raw[24]),
        )
    )
