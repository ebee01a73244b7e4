"""What the demo's clients ask for: the same seed gives the same requests."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from otel_npu.ids import new_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

_STALLED_AT: Final = 0.6  # of the run
_FIRST_TOKENS: Final = 8  # of the answer; what is special about a request happens after them


@dataclass
class Request:
    """One request, from its arrival to its end.

    Attributes:
        after_steps: How many steps after the request before it arrives.
        prompt_tokens: The length of its prompt.
        output_tokens: How many tokens its client wants.
        hangs_up: Whether its client goes away after the first of them.
        is_stalled: Whether the step after the first of them waits for a late peer.
    """

    after_steps: int
    prompt_tokens: int
    output_tokens: int
    hangs_up: bool = False
    is_stalled: bool = False
    key: bytes = field(default_factory=lambda: new_bytes(8))
    trace_id: bytes = field(default_factory=lambda: new_bytes(16))
    arrived_unix_ns: int = 0
    first_token_unix_ns: int = 0
    computed: int = 0
    """How much of its prompt has been computed."""
    generated: int = 0

    @property
    def response_id(self) -> str:
        """As its client knows it."""
        return f"cmpl-{self.key.hex()}"

    @property
    def request_id(self) -> str:
        """As vLLM's engine calls it."""
        return f"{self.response_id}-0"

    @property
    def has_begun(self) -> bool:
        """Whether it has the first tokens of its answer."""
        return self.generated == _FIRST_TOKENS

    @property
    def has_ended(self) -> bool:
        """Whether it has its whole answer."""
        return self.generated >= self.output_tokens


def requests(seed: int, count: int, *, forever: bool = False) -> Iterator[Request]:
    """Requests in the order of their arrival; one of each `count` is stalled, and of one the client goes away.

    Args:
        seed: Of when they arrive and how long they are.
        count: How many.
        forever: Whether to begin again after the last.
    """
    generator = random.Random(seed)  # noqa: S311  noise, not secrets
    while True:
        stalled = round(_STALLED_AT * (count - 1))
        aborted = stalled // 3
        for number in range(count):
            yield Request(
                after_steps=generator.randint(2, 12),
                prompt_tokens=generator.randint(128, 3072),
                output_tokens=generator.randint(2 * _FIRST_TOKENS, 4 * _FIRST_TOKENS),
                is_stalled=number == stalled,
                hangs_up=number == aborted,
            )
        if not forever:
            return


class Arrivals:
    """Hands out the requests when they arrive, counted in steps: so nothing depends on how quick the machine is.

    Args:
        coming: The requests.
    """

    def __init__(self, coming: Iterator[Request]) -> None:
        self._coming = coming
        self._next = next(coming, None)
        self._steps_since = 0

    @property
    def over(self) -> bool:
        """Whether nobody comes any more."""
        return self._next is None

    def after_step(self, *, idle: bool) -> deque[Request]:
        """Who has arrived after one more step; somebody, if there is nothing else to do."""
        arrived: deque[Request] = deque()
        self._steps_since += 1
        while self._next is not None and (self._steps_since >= self._next.after_steps or (idle and not arrived)):
            arrived.append(self._next)
            self._steps_since = 0
            self._next = next(self._coming, None)
        return arrived
