"""What the processes of a session send, followed by the relay's own code: placed in time, joined, made into spans."""

from __future__ import annotations

import functools
import time
from typing import TYPE_CHECKING

import msgspec

from otel_npu.drops import Drops
from otel_npu.ids import new_bytes
from otel_npu.relay.assembler import Assembler
from otel_npu.relay.client import Client
from otel_npu.relay.joiner import Joiner
from otel_npu.relay.making import Unmade
from otel_npu.relay.wall import WallClock
from otel_npu.wire import frames

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from opentelemetry.sdk.trace import ReadableSpan, SpanLimits

    from otel_npu.relay.assembler import Counting
    from otel_npu.wire.looking import Seen


class Follower:
    """Follows all processes of one session.

    Args:
        told: Gives, for a process, what is told of each of its steps; None if nothing is.
        put: Where the spans of steps go: of all steps if it is given, of none without it.
        now: Seconds that go on by themselves.
    """

    def __init__(
        self,
        told: Callable[[frames.Hello], Counting | None] = lambda _: None,
        put: Callable[[Sequence[ReadableSpan]], None] | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._told = told
        self._put = put
        self._wall = WallClock()
        self._clients: dict[int, Client] = {}
        self._drops = Drops()
        self._joiner = Joiner(self._wall, lambda spans, _: self._take_spans(spans), self._drops, now)
        self.unreadable = 0
        """So many frames could not be read: the relay has counted them too."""

    def take(self, seen: Seen) -> None:
        """One more packet."""
        client = self._clients.setdefault(seen.number, Client())
        try:
            taken = frames.frames_in(seen.packet)
        except msgspec.MsgspecError:
            self.unreadable += 1
            return
        for frame in taken:  # one that is bad costs no other
            try:
                self._handle(client, frames.decode_frame(frame))
            except (msgspec.MsgspecError, ValueError):
                self.unreadable += 1

    def waits_for(self, first_ns: int, last_ns: int) -> bool:
        """Whether a step of an engine that began between these instants of the host's monotonic clock is not over."""
        return any(
            step.scheduled is not None and first_ns <= step.scheduled.opened_ns < last_ns
            for step in self._joiner.steps()
        )

    def tick(self) -> None:
        """Be done with what has waited long enough. Call it often."""
        self._joiner.tick()

    def finish(self) -> None:
        """Nothing more will come."""
        self._joiner.drain()

    def _handle(self, client: Client, frame: frames.Frame) -> None:
        if isinstance(frame, frames.Hello):
            client.greeted = Assembler(frame, self._wall, _span_limits, None, self._told(frame), self._drops)
        elif isinstance(frame, frames.Step):
            self._step(client, frame)
        elif isinstance(frame, frames.Ping):
            client.assembler.timeline.ping(frame)
        elif isinstance(frame, frames.Unfinished):
            if client.assembler.counted is not None:
                client.assembler.counted.hang(frame)
        elif isinstance(frame, frames.Scheduled):
            kept = self._put is not None
            trace_id = frame.trace_id or frame.span_id * 2
            self._joiner.take(client, msgspec.structs.replace(frame, kept=kept, trace_id=trace_id))
        elif isinstance(frame, (frames.Request, frames.Updated, frames.RequestEnd, frames.Transfers)):
            self._joiner.take(client, frame)

    def _step(self, client: Client, frame: frames.Step) -> None:
        """A step: where spans are wanted it is a trace, whatever was decided when it began."""
        if self._put is not None:
            span_id = frame.span_id or new_bytes(8)
            # As its engine's is, so that they are of one trace.
            trace_id = frame.trace_id or (frame.parent_span_id or span_id) * 2
            frame = msgspec.structs.replace(frame, kept=True, trace_id=trace_id, span_id=span_id)
        self._take_spans(client.assembler.step(frame, functools.partial(self._joiner.ran, client)))

    def _take_spans(self, spans: Sequence[ReadableSpan]) -> None:
        # Those of requests come from the relay, which has seen all of their steps: they give way to nothing.
        of_request = isinstance(spans, Unmade) and not spans.gives_way
        if self._put is not None and not of_request and spans:
            self._put(spans)


@functools.cache
def _span_limits() -> SpanLimits:
    from otel_npu.relay.spans import span_limits

    return span_limits()
