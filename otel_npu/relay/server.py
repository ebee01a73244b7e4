"""The relay's loop: reads frames, has spans made of them when there is time, answers flushes."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import socket
import time
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

import msgspec

from otel_npu import semconv
from otel_npu.drops import REPORT_SECONDS, Drops, add_up
from otel_npu.relay.assembler import Assembler
from otel_npu.relay.clients import PACKETS_PER_TURN, Clients, Connected
from otel_npu.relay.joiner import Joiner
from otel_npu.relay.ledger import CROWDED_BYTES, Ledger
from otel_npu.relay.making import Making
from otel_npu.relay.metrics.counted import Metrics
from otel_npu.relay.pace import FIRST_SECONDS, Pace
from otel_npu.relay.patience import Patience
from otel_npu.relay.switching import Switching
from otel_npu.relay.viewers import Viewers
from otel_npu.relay.wall import WallClock
from otel_npu.slow import SlowSteps
from otel_npu.wire import frames

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from opentelemetry.sdk.trace import SpanLimits
    from opentelemetry.sdk.trace.export import SpanExporter

    from otel_npu.relay.account import Account
    from otel_npu.relay.export import ExportQueue

_log = logging.getLogger("otel_npu.relay")

_TICK_SECONDS: Final = 0.1
_FIRST_CLIENT_SECONDS: Final = 10.0
FRAMES_PER_TURN: Final = 1024
"""So many of one client are read, then it is the others' turn: a packet may have any number. A stock socket holds fewer
in packets of eight steps, so a flush still reads all that was sent before it."""
# How much processor time goes into spans before the next look. Reading comes first, but what was read has to be made.
_MAKE_SECONDS: Final = 0.02
_MAKE_SECONDS_BEHIND: Final = 0.005
_MAKE_SHARE_BEHIND: Final = 0.5
DRAIN_SECONDS: Final = 5.0
"""For how long it waits in the end for a receiver that takes nothing."""
MAX_DRAIN_SECONDS: Final = 30.0
"""And for one that takes something."""
METRICS_SECONDS: Final = 2.0
_LAST_SECONDS: Final = 0.2
DRAIN_LOOK_SECONDS: Final = 0.05
_MAX_FLUSH_SECONDS: Final = 60.0
_MAX_FLUSHES: Final = 64
_FLUSH_LOOK_SECONDS: Final = 0.005
_COMPLAINTS_PER_CLIENT: Final = 5
_COMPLAINTS_PER_REPORT: Final = 20
_COMPLAINT_CHARACTERS: Final = 200


class _Flushing(NamedTuple):
    client: Connected
    number: int
    deadline: float


class Server:
    """Serves the processes of one session.

    Args:
        exporters: Where spans go; or what makes that, called on a thread of its own while frames are read already.
        listeners: Take new connections; without one the server has only the clients it is given.
        stay: Whether to go on when the last client has gone, as a relay in a container of its own does.
        metrics: Makes what counts for the metrics, given where drops are counted; without it there are none.
        environment: The standard variables.
        loaded: Called once all is imported.
    """

    def __init__(
        self,
        exporters: Sequence[SpanExporter] | Callable[[], Sequence[SpanExporter]],
        listeners: Sequence[socket.socket] = (),
        *,
        stay: bool = False,
        metrics: Callable[[Drops], Metrics | None] = lambda _: None,
        environment: Mapping[str, str] = os.environ,
        loaded: Callable[[], None] = lambda: None,
    ) -> None:
        self._loaded = loaded
        self._drops = Drops()
        self._metrics = metrics(self._drops)
        self._environment = environment
        self._stay = stay
        self._wall = WallClock()
        self._ledger = Ledger()
        self._patience = Patience()
        self._pace = Pace()
        self._making = Making(functools.partial(self._load, exporters), self._drops)
        self._joiner = Joiner(self._wall, self._making.put, self._drops, self._patience)
        self._clients = Clients(listeners, self._drops, self._parted)
        self._viewers = Viewers(self._clients, self._joiner.open_requests, self._state)
        self._switching = Switching(self._clients, lambda: self._joiner.pause(time.perf_counter_ns()))
        self._dropped: dict[str, int] = {}
        """What the processes have left out, by reason."""
        self._limits = functools.cache(_span_limits)
        self._asked: list[_Flushing] = []
        """Flushes that have been read just now."""
        self._flushes: list[tuple[_Flushing, int]] = []
        """Those that wait, each until so many of its client's spans are exported."""
        self._owed: list[Account] = []
        """Of clients that have gone, those of whose spans some may wait."""
        self._started = time.monotonic()
        self._had_clients = False
        self._stopping = False
        self._next_tick = 0.0
        self._next_drop_line = time.monotonic() + REPORT_SECONDS
        self._complaints = 0
        if callable(exporters):
            self._making.load_beside()
        else:
            self._making.load()

    @classmethod
    def from_environment(
        cls,
        listeners: Sequence[socket.socket] = (),
        *,
        stay: bool = False,
        environment: Mapping[str, str] = os.environ,
        loaded: Callable[[], None] = lambda: None,
    ) -> Server:
        """A server with the exporters that the environment names. If it names a bad one, nothing is exported."""
        return cls(
            functools.partial(exporters_of, environment),
            listeners,
            stay=stay,
            metrics=functools.partial(Metrics.from_environment, environment=environment),
            environment=environment,
            loaded=loaded,
        )

    def _load(self, exporters: Sequence[SpanExporter] | Callable[[], Sequence[SpanExporter]]) -> ExportQueue:
        export = _export_queue(exporters, self._drops, self._environment)
        if self._metrics is not None:
            self._metrics.load(export.fill, self._environment)
        self._loaded()
        return export

    def add_client(self, connection: socket.socket) -> None:
        """Serve this connection too."""
        self._clients.add(connection)

    def stop(self) -> None:
        """Read what is there, export it, and end. Safe in a signal handler and from other threads."""
        self._stopping = True
        self._clients.wake()

    def close(self) -> None:
        """Let go of all that it has: it is not to run after all."""
        self._making.all().close(0.0)
        if self._metrics is not None:
            self._metrics.close(0.0)
        self._clients.close()

    def run(self, leave: Callable[[], None] = lambda: None, exporting: Callable[[int], None] = lambda _: None) -> None:
        """Serve until there is nobody left to serve, or until stopped; then read and export what is there.

        Args:
            leave: Called once nobody is taken any more: takes the sockets' names away.
            exporting: Told how many spans wait, again and again while nobody is left, but what they left is exported.
        """
        try:
            self._serve()
            leave()
            self._read_the_rest()
        except OSError as error:
            _log.warning("the relay's descriptors were closed under it, so what it held is lost: %s", error)
            self._clients.abandon()
        self._guarded(self._joiner.drain)
        export = self._making.all()
        done = all_exported(export, lambda: self._tell_of_the_rest(exporting))
        export.close(DRAIN_SECONDS if done else _LAST_SECONDS)
        if self._metrics is not None:  # after the spans, so that it says what became of them
            self._metrics.close(METRICS_SECONDS if done else _LAST_SECONDS)
        self._log_drops()
        self._clients.close()

    def _tell_of_the_rest(self, exporting: Callable[[int], None]) -> None:
        if not len(self._clients):
            exporting(sum(account.accepted - account.handled for account in self._owed))

    def _serve(self) -> None:
        wait_seconds = 0.0
        left = False
        while not self._stopping:
            if self._deserted():
                if not left:
                    self._clients.refuse()
                    left = True
                if not self._clients.accept_waiting():
                    break
            wait_seconds = self._rest(self._turn(wait_seconds))
        self._clients.refuse()

    def _read_the_rest(self) -> None:
        self._clients.accept_waiting()
        for client in self._clients:
            # What is in the socket is read; what the client has still to say it keeps for the next relay.
            with contextlib.suppress(OSError):
                client.connection.shutdown(socket.SHUT_RD)
        while self._turn(0.0):
            pass

    def _deserted(self) -> bool:
        if len(self._clients):
            self._had_clients = True
            return False
        if self._stay:
            return False
        return self._had_clients or time.monotonic() - self._started > _FIRST_CLIENT_SECONDS

    def _rest(self, packets: int) -> float:
        """Leave the senders alone for a while; for how long to wait in their sockets then."""
        if packets >= PACKETS_PER_TURN or self._making.waiting:
            return 0.0
        if self._viewers.followers:
            self._viewers.drain()
        pause = self._pace.pause(packets)
        if self._flushes or self._asked:
            pause = _FLUSH_LOOK_SECONDS
        elif pause is not None and (self._viewers.followers or self._switching.waiting):
            pause = min(pause, FIRST_SECONDS)  # somebody looks on, or waits
        if pause is not None:
            self._clients.rest(pause)
            return 0.0
        if self._joiner.waiting or self._switching.waiting or self._viewers.behind or not len(self._clients):
            return _TICK_SECONDS
        return max(0.0, self._next_drop_line - time.monotonic())

    def _turn(self, wait_seconds: float) -> int:
        """Handle what is there; how many packets the one that had sent most had sent."""
        clients, began = self._clients.wait(wait_seconds), time.thread_time()
        packets = self._read(clients)
        took = time.thread_time() - began
        self._patience.turn()
        if self._asked or self._flushes:
            self._answer_flushes()
        now = time.monotonic()
        if now >= self._next_tick:
            self._next_tick = now + _TICK_SECONDS / 2
            self._guarded(self._joiner.tick)
            self._guarded(self._switching.tick)
        behind = packets >= PACKETS_PER_TURN
        self._making.some(max(_MAKE_SECONDS_BEHIND, took * _MAKE_SHARE_BEHIND) if behind else _MAKE_SECONDS)
        if now >= self._next_drop_line:
            self._next_drop_line = now + REPORT_SECONDS
            self._complaints = 0
            self._log_drops()
        return packets

    def _read(self, clients: Iterable[Connected]) -> int:
        """Read each one's share; how many packets the one that had sent most had sent, or as many as there may be.

        Engines come first: what is known when a worker tells of its part of a step need not be looked up again. Then
        those of whom least is held. While others have something, nobody is read of whom much is held: what is held of a
        worker's steps is waited for from its engine, and what is not read waits in its process.
        """
        most = 0
        engines = self._joiner.engines

        def turn(client: Connected) -> tuple[bool, bool, int]:
            return _crowded(client), client not in engines, client.account.held_bytes

        for client in sorted(clients, key=turn):
            if most and _crowded(client):
                return PACKETS_PER_TURN
            packets = taken = 0
            for packet in self._clients.packets(client):
                packets += 1
                if self._viewers.followers and packet is not None:
                    self._viewers.forward(client, packet)
                taken += self._take_packet(client, packet)
                if taken >= FRAMES_PER_TURN:
                    packets = PACKETS_PER_TURN
                    break
            most = max(most, packets)
        return most

    def _take_packet(self, client: Connected, packet: memoryview | None) -> int:
        """Take what is in it: so many frames."""
        if packet is None:
            self._bad_frame(client, "longer than frames may be")
            return 1
        try:
            taken = frames.frames_in(packet)
        except msgspec.MsgspecError as error:
            self._bad_frame(client, str(error))
            return 1
        for frame in taken:  # one that is bad costs no other
            self._take(client, frame)
        return len(taken)

    def _take(self, client: Connected, encoded: bytes | memoryview | msgspec.Raw) -> None:
        try:
            frame = frames.decode_frame(encoded)
            self._patience.read(frame)
            while not self._ledger.has_room(client.account, frame):
                if not self._making.give_way(client.account):
                    self._drops.add(semconv.RELAY_FULL)
                    client.account.lose()
                    return
            self._ledger.hold(client.account, frame, memoryview(encoded).nbytes)
            self._handle(client, frame)
        except (msgspec.MsgspecError, ValueError) as error:
            self._bad_frame(client, str(error))
        except Exception:
            self._drops.add(semconv.INTERNAL_ERROR)
            client.account.lose()
            _log.exception("a fault of otel-npu's own; the frame is lost")

    def _handle(self, client: Connected, frame: frames.Frame) -> None:
        if isinstance(frame, frames.Hello):
            self._greet(client, frame)
        elif isinstance(frame, frames.Flush):
            self._flush(client, frame)
        elif isinstance(frame, frames.Ping):
            client.assembler.timeline.ping(frame)
        elif isinstance(frame, frames.Unfinished):
            self._unfinished(client, frame)
        elif isinstance(frame, frames.Step):
            add_up(self._dropped, frame.dropped)
            spans = client.assembler.step(frame, functools.partial(self._joiner.ran, client))
            self._making.put(spans, client.account)
        elif isinstance(frame, (frames.Look, frames.Switch, frames.Switched)):
            self._look(client, frame)
        else:
            if isinstance(frame, (frames.Scheduled, frames.RequestEnd)):
                add_up(self._dropped, frame.dropped)
            self._joiner.take(client, frame)

    def _greet(self, client: Connected, frame: frames.Hello) -> None:
        if frame.protocol != frames.PROTOCOL:
            raise ValueError(f"protocol {frame.protocol}, this relay has {frames.PROTOCOL}")
        if client.looks:
            raise ValueError("one who looks at others that wants to be a traced process")
        counted = None if self._metrics is None else self._metrics.process(frame)
        slow = SlowSteps(frame.slow_step, self._drops)
        assembler = Assembler(frame, self._wall, self._limits, slow, counted, self._drops)
        assembler.replaces(client.greeted)
        client.greeted = assembler
        self._switching.greeted(client, on=frame.on)

    def _look(self, client: Connected, frame: frames.Look | frames.Switch | frames.Switched) -> None:
        if isinstance(frame, frames.Look):
            self._viewers.look(client, frame)
            self._making.told = self._viewers.made if self._viewers.followers else None
        elif isinstance(frame, frames.Switched):
            client.on = frame.on
        elif client.looks:
            self._switching.want(on=frame.on)
        else:
            raise ValueError("a traced process that wants to switch others")

    def _state(self) -> tuple[dict[str, int], tuple[int, int, int]]:
        """What was left out, and how full the queue of spans is."""
        dropped = self._drops.totals()
        add_up(dropped, self._dropped)
        export = self._making.export
        return dropped, (0, 0, 0) if export is None else export.fill()

    def _unfinished(self, client: Connected, frame: frames.Unfinished) -> None:
        span = client.assembler.unfinished(frame)
        if client.assembler.counted is not None:
            client.assembler.counted.hang(frame)
        if frame.trace_id:
            self._making.put([span], client.account)
        if frame.engine_span_id:
            self._joiner.keep(frame.engine_span_id, semconv.HANG)

    # Flushes.

    def _flush(self, client: Connected, frame: frames.Flush) -> None:
        if len(self._asked) + len(self._flushes) >= _MAX_FLUSHES * max(1, len(self._clients)):
            raise ValueError("more flushes than are answered at once")
        deadline = time.monotonic() + min(frame.timeout_seconds, _MAX_FLUSH_SECONDS)
        self._asked.append(_Flushing(client, frame.number, deadline))

    def _answer_flushes(self) -> None:
        """Answer those that are done or out of time; the others must not wait for them."""
        export = self._making.export
        if export is not None and self._asked:
            asked, self._asked = self._asked, []
            self._read(self._clients.wait(0.0))  # what others have sent before it lies in their sockets
            self._guarded(self._joiner.flush)
            export = self._making.all()
            self._flushes += [(flushing, flushing.client.account.accepted) for flushing in asked]
        now = time.monotonic()
        if export is not None:
            waiting, self._flushes = self._flushes, []
            for flushing, accepted in waiting:
                outcome = export.outcome(flushing.client.account, accepted)
                if outcome is None and now < flushing.deadline:
                    self._flushes.append((flushing, accepted))
                else:
                    _answer(flushing, complete=bool(outcome))
        for flushing in [flushing for flushing in self._asked if now >= flushing.deadline]:
            self._asked.remove(flushing)
            _answer(flushing, complete=False)

    # Faults.

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception:
            self._drops.add(semconv.INTERNAL_ERROR)
            _log.exception("a fault of otel-npu's own; spans are lost")

    def _bad_frame(self, client: Connected, why: str) -> None:
        self._drops.add(semconv.BAD_FRAME)
        client.account.lose()
        why = why[:_COMPLAINT_CHARACTERS]
        known = why in client.complaints or len(client.complaints) >= _COMPLAINTS_PER_CLIENT
        if not known and self._complaints < _COMPLAINTS_PER_REPORT:  # once, not once a frame
            self._complaints += 1
            client.complaints.add(why)
            number = client.connection.fileno()
            _log.warning("a frame on connection %d can't be read and is left out: %s", number, why)

    def _parted(self, client: Connected) -> None:
        self._asked = [flushing for flushing in self._asked if flushing.client is not client]
        self._flushes = [item for item in self._flushes if item[0].client is not client]
        if client.looks:
            self._viewers.part(client)
            self._making.told = self._viewers.made if self._viewers.followers else None
            return
        self._guarded(lambda: self._joiner.part(client))
        if client.greeted is not None:
            client.greeted.part()
        self._owed = [account for account in self._owed if account.handled < account.accepted] + [client.account]

    def _log_drops(self) -> None:
        line = self._drops.take_line()
        if line:
            _log.warning("left out in the last minute: %s", line)


def _crowded(client: Connected) -> bool:
    """Whether so much is held of it that others come before it."""
    return client.account.held_bytes > CROWDED_BYTES


def exporters_of(environment: Mapping[str, str]) -> Sequence[SpanExporter]:
    """The exporters that the environment names; if it names a bad one, one that takes spans nowhere."""
    from otel_npu.relay.exporters import Nowhere, exporters_from_environment
    from otel_npu.relay.otlp_settings import ExportError

    try:
        return exporters_from_environment(environment)
    except ExportError as error:
        _log.error("%s; no spans are exported", error)
    except Exception:
        _log.exception("the exporter could not be made; no spans are exported")
    return [Nowhere()]


def _export_queue(
    exporters: Sequence[SpanExporter] | Callable[[], Sequence[SpanExporter]],
    drops: Drops,
    environment: Mapping[str, str],
) -> ExportQueue:
    # All that is imported late, at once: while frames are read or, on a thread of a program, before it can fork.
    from otel_npu.relay import request_spans, resources  # noqa: F401
    from otel_npu.relay.export import ExportQueue

    return ExportQueue(exporters() if callable(exporters) else exporters, drops, environment)


class _Exporting(Protocol):
    def wait(self, timeout_seconds: float) -> int:
        """As `ExportQueue.wait`."""


def all_exported(export: _Exporting, waits: Callable[[], None]) -> bool:
    """Wait as long as spans get through; whether all did.

    Counted in looks, not by the clock: a relay that gets too little of the processor is late, but loses nothing.

    Args:
        export: What is left, and on its way.
        waits: Called after each look, while something is left.
    """
    least, in_vain = math.inf, 0
    for _ in range(round(MAX_DRAIN_SECONDS / DRAIN_LOOK_SECONDS)):
        left = export.wait(DRAIN_LOOK_SECONDS)
        if not left:
            return True
        in_vain = 0 if left < least else in_vain + 1
        least = min(least, left)
        if in_vain * DRAIN_LOOK_SECONDS >= DRAIN_SECONDS:
            break
        waits()
    return False


def _span_limits() -> SpanLimits:
    from otel_npu.relay.spans import span_limits

    return span_limits()


def _answer(flushing: _Flushing, *, complete: bool) -> None:
    answer = frames.encode(frames.Flushed(flushing.number, complete))
    with contextlib.suppress(OSError):  # nobody waits for it any more, or reads its answers
        flushing.client.connection.send(answer, socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
