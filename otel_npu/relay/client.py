"""A traced process, as the relay knows it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from otel_npu.relay.account import Account

if TYPE_CHECKING:
    from otel_npu.relay.assembler import Assembler


class Client:
    """One process: until it has said hello, nobody."""

    def __init__(self) -> None:
        self.greeted: Assembler | None = None
        self.account = Account()

    @property
    def assembler(self) -> Assembler:
        """Makes its spans.

        Raises:
            ValueError: It has not said hello.
        """
        if self.greeted is None:
            raise ValueError("a frame before the hello")
        return self.greeted
