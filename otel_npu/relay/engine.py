"""An engine: its requests and its steps, as far as they are not over."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

if TYPE_CHECKING:
    from otel_npu.relay.client import Client
    from otel_npu.relay.engine_step import EngineStep
    from otel_npu.relay.requests import OpenRequest
    from otel_npu.wire.frames import Request, Scheduled

_MAX_LISTED: Final = 16  # as many as a process has engines, and more


class Engine:
    """The process of an engine: its requests by their numbers, and those of its steps that are not over."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.requests: dict[int, OpenRequest] = {}
        self.steps: dict[bytes, EngineStep] = {}
        """By span id, in the order of scheduling."""
        self.sends: dict[int, tuple[Request, int]] = {}
        """By number: requests that are over, but whose KV cache is not fetched yet, and since when."""
        self._listed: dict[bytes, Scheduled] = {}
        """By span id: the frames that listed their requests last, or were referred to."""

    def fill_in(self, frame: Scheduled) -> None:
        """Give a scheduling that refers to an earlier one for its requests those of that one, if it is known still."""
        if not frame.like:
            self._listed[frame.span_id] = frame
            if len(self._listed) > _MAX_LISTED:
                del self._listed[next(iter(self._listed))]
            return
        earlier = self._listed.pop(frame.like, None)
        if earlier is not None:
            self._listed[frame.like] = earlier
            for name in ("requests", "tokens", "prefills"):
                msgspec.structs.force_setattr(frame, name, getattr(earlier, name))
