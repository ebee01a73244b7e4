"""What is chosen for a request when it arrives, and the private header by which its engine hears of it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

    from opentelemetry.context import Context

KEY: Final = "x-otel-npu-request"
"""The private header; it never leaves vLLM."""

_ANNOUNCED: Final = re.compile(r"([0-9a-f]{16})-([0-9a-f]{32})-([0-9a-f]{16});(.*)", re.DOTALL)
_COMPLETION: Final = re.compile(r"(cmpl-.+)-\d+", re.DOTALL)


class Announced(NamedTuple):
    """A sampled request: its key, its trace, the span that its spans are children of, and its id for the user."""

    key: bytes
    trace_id: bytes
    parent_span_id: bytes
    request_id: str

    @property
    def response_id(self) -> str:
        """The request by the id that its client got: for each prompt of `/v1/completions` vLLM adds a number to it."""
        match = _COMPLETION.fullmatch(self.request_id)
        return match[1] if match is not None else self.request_id

    def header(self) -> str:
        """The value of the private header."""
        return f"{self.key.hex()}-{self.trace_id.hex()}-{self.parent_span_id.hex()};{self.request_id}"


def announced(headers: Mapping[str, str] | None) -> Announced | None:
    """The request that these trace headers announce, or None: it isn't sampled, or nobody has looked at it."""
    match = _ANNOUNCED.fullmatch(headers.get(KEY, "")) if headers else None
    if match is None:
        return None
    return Announced(bytes.fromhex(match[1]), bytes.fromhex(match[2]), bytes.fromhex(match[3]), match[4])


class Arrival:
    """What was chosen for a request when it arrived.

    Attributes:
        announced: The request, if it is sampled.
        context: The OpenTelemetry context that is its parent's; an empty one for a root.
        sampling: The sampler's verdict, where vLLM traces.
        arrived_unix_ns: When it arrived.
    """

    __slots__ = ("announced", "arrived_unix_ns", "context", "ended", "sampling")

    def __init__(self, announced: Announced | None, context: Context, sampling: Any, arrived_unix_ns: int) -> None:
        self.announced = announced
        self.context = context
        self.sampling = sampling
        self.arrived_unix_ns = arrived_unix_ns
        self.ended = False
