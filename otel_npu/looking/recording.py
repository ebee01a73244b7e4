"""Records all that a session does for a while: packets as they come, made into spans when it is over."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from otel_npu import semconv
from otel_npu.looking import otlp_json
from otel_npu.looking.follow import Follower
from otel_npu.looking.session import LookError
from otel_npu.looking.span import Span, spans_of
from otel_npu.relay.wall import WallClock
from otel_npu.wire.looking import Made, Seen

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from opentelemetry.sdk.trace import ReadableSpan

    from otel_npu.looking.session import Connection
    from otel_npu.wire.looking import View

WARM_UP_SECONDS: Final = 1.2
"""Followed before the recording: each device's clock is looked at once a second, and steps that were under way end."""
TAIL_SECONDS: Final = 1.0
LONGEST_TAIL_SECONDS: Final = 10.0
"""Followed after it: until the steps that began in it have ended on all ranks."""
MAX_BYTES: Final = 1 << 29
_LOOK_SECONDS: Final = 0.1


class Recording:
    """What was recorded.

    Attributes:
        cut: Why it ended before its time, or lacks something; empty if it is whole.
        began_ns: When it began, by the host's monotonic clock.
        ended_ns: When it ended.
    """

    def __init__(self) -> None:
        self.cut = ""
        self.began_ns = self.ended_ns = 0
        self._views: list[tuple[float, View]] = []
        self._bytes = 0

    def run(
        self,
        connection: Connection,
        seconds: float,
        stopped: Callable[[], bool] = lambda: False,
        progress: Callable[[float], None] = lambda _: None,
    ) -> None:
        """Record for so long.

        Args:
            connection: To the session.
            seconds: How long.
            stopped: Whether to end now, and keep what there is.
            progress: Told how many seconds are recorded.
        """
        try:
            connection.ask(follow=True)
            self._listen(connection, WARM_UP_SECONDS, stopped)
            self.began_ns = time.perf_counter_ns()
            self.ended_ns = self.began_ns + round(seconds * 1e9)
            self._listen(connection, seconds, stopped, progress)
            self.ended_ns = min(self.ended_ns, time.perf_counter_ns())
            self._listen(connection, TAIL_SECONDS)
            unseen = connection.ask().unseen
            if unseen:
                self.cut = f"{unseen} packets are missing: they came faster than they could be read here"
        except LookError as error:
            self.ended_ns = min(self.ended_ns, time.perf_counter_ns())
            self.cut = f"{error}; what was recorded until then is kept"

    def _listen(
        self,
        connection: Connection,
        seconds: float,
        stopped: Callable[[], bool] = lambda: False,
        progress: Callable[[float], None] = lambda _: None,
    ) -> None:
        began = time.monotonic()
        while (left := began + seconds - time.monotonic()) > 0 and not stopped():
            for view in connection.views(min(left, _LOOK_SECONDS)):
                self.add(view, time.monotonic())
            progress(time.monotonic() - began)
            if self._bytes > MAX_BYTES:
                self.cut = f"it holds {MAX_BYTES >> 20} MB and ended there"
                return

    def add(self, view: View, at: float) -> None:
        """One more packet, at this second of the monotonic clock."""
        self._views.append((at, view))
        if isinstance(view, Seen):
            self._bytes += memoryview(view.packet).nbytes
        elif isinstance(view, Made):
            self._bytes += len(view.request)

    def spans(self, connection: Connection | None = None, slowest: int | None = None) -> list[Span]:
        """The spans of the steps that began meanwhile, each with all its ranks, and of the requests that ended.

        Args:
            connection: Where what is still to come may come from.
            slowest: So many steps alone, the slowest; None for all steps, and requests.
        """
        clock = [0.0]
        units = Units()
        follower = Follower(put=units.put, now=lambda: clock[0])
        requests: list[Span] = []
        for clock[0], view in self._views:
            if isinstance(view, Seen):
                follower.take(view)
                follower.tick()
            elif isinstance(view, Made):
                requests += otlp_json.from_protobuf(view.request)
        self._await(connection, follower, clock)
        follower.finish()
        unix_ns = WallClock().offset_ns()
        first_ns, last_ns = self.began_ns + unix_ns, self.ended_ns + unix_ns
        steps = [unit for unit in units.all() if first_ns <= unit.start_ns < last_ns]
        if slowest is not None:
            steps = sorted(steps, key=lambda unit: unit.start_ns - unit.end_ns)[:slowest]
            requests = []
        ended = _ended(requests, first_ns, last_ns)
        return [span for unit in sorted(steps, key=lambda unit: unit.start_ns) for span in unit.spans] + ended

    def _await(self, connection: Connection | None, follower: Follower, clock: list[float]) -> None:
        """Follow the session until the steps that began in the recording have ended on all ranks."""
        if connection is None:
            return
        deadline = time.monotonic() + LONGEST_TAIL_SECONDS
        try:
            while follower.waits_for(self.began_ns, self.ended_ns) and time.monotonic() < deadline:
                for view in connection.views(_LOOK_SECONDS):
                    if isinstance(view, Seen):
                        follower.take(view)
                clock[0] = time.monotonic()
                follower.tick()
        except LookError:
            pass  # nothing more will come


class Unit:
    """A step: an engine's with all its ranks, or a program's own. Times are Unix times in nanoseconds."""

    def __init__(self) -> None:
        self.spans: list[Span] = []

    @property
    def start_ns(self) -> int:
        """When it began."""
        return min(span.start_ns for span in self.spans)

    @property
    def end_ns(self) -> int:
        """When it ended."""
        return max(span.end_ns for span in self.spans)


class Units:
    """Puts together what belongs to one step."""

    def __init__(self) -> None:
        self._units: dict[str, Unit] = {}

    def put(self, made: Sequence[ReadableSpan]) -> None:
        """The spans of one rank's part of a step, or an engine's own."""
        spans = spans_of(made)
        for span in spans:
            span.attributes.pop(semconv.SAMPLED_REASON, None)  # here every step is kept, whatever it is elsewhere
        root = next((span for span in spans if span.name.startswith(semconv.WORKER_STEP)), spans[0])
        key = root.parent_id if semconv.RANK in root.attributes and root.parent_id else root.span_id
        self._units.setdefault(key, Unit()).spans += spans

    def all(self) -> list[Unit]:
        """All steps."""
        return list(self._units.values())


def _ended(requests: Sequence[Span], first_ns: int, last_ns: int) -> list[Span]:
    """The spans of those requests that ended in the recording."""
    by_request: dict[tuple[str, str], list[Span]] = {}
    known = {span.span_id: span for span in requests}
    for span in requests:
        top = span
        while top.parent_id in known:
            top = known[top.parent_id]
        by_request.setdefault((top.trace_id, top.parent_id or top.span_id), []).append(span)
    return [
        span
        for spans in by_request.values()
        if first_ns <= max(span.end_ns for span in spans) < last_ns
        for span in spans
    ]
