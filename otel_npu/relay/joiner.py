"""Joins what engines, workers and front ends say of the same steps and requests, in whatever order it comes.

Each process's frames come in order, but the relay reads one process's after another's, so whoever comes first makes
the record. What is missing is waited for, never long: every record has a deadline.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from otel_npu import semconv
from otel_npu.relay.engine import Engine
from otel_npu.relay.engine_step import EngineStep
from otel_npu.relay.making import Unmade
from otel_npu.relay.requests import OpenRequest
from otel_npu.relay.strangers import Strangers
from otel_npu.wire import frames

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Sequence

    from opentelemetry.sdk.trace import ReadableSpan

    from otel_npu.drops import Drops
    from otel_npu.relay.account import Account
    from otel_npu.relay.client import Client
    from otel_npu.relay.placing import Ran
    from otel_npu.relay.wall import WallClock

RANKS_SECONDS: Final = 0.8
"""For how long a step that is over waits for ranks that have not told of it: they may be on another host."""
SILENT_SECONDS: Final = 1.0
"""How long after its run a step counts as over although its output was not taken in."""
RUNNING_SECONDS: Final = 600.0
"""The same for a step whose output rank has not told of it: it may well be running still, or compiling."""
END_SECONDS: Final = 0.8
"""For how long a request waits for the other end of it to be known, and for its last steps."""
STRANGER_SECONDS: Final = 2.0
"""For how long a step or a request's end is kept that no engine has told of: its engine may be on another host."""
HELD_STAGES: Final = 65_536
"""So many stages such steps have at most."""
MAX_REQUESTS: Final = 16_384
"""So many are under way at most. Of the engine that has most the newest is given up: it waits, while the others run."""


class Joiner:
    """All engines' steps and requests of one relay.

    Args:
        wall: The wall clock of this host.
        put: Where a client's spans go: each call's together.
        drops: Where requests that are given up are counted.
        now: Seconds that go on by themselves.
    """

    def __init__(
        self,
        wall: WallClock,
        put: Callable[[Sequence[ReadableSpan], Account], None],
        drops: Drops,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._wall = wall
        self._put = put
        self._drops = drops
        self._now = now
        self._engines: dict[Client, Engine] = {}
        self._steps: dict[bytes, EngineStep] = {}
        """By span id; those that no engine has told of yet too."""
        self._requests: dict[bytes, OpenRequest] = {}
        """By key, the oldest first."""
        self._ending: dict[bytes, OpenRequest] = {}
        """Those of them of which an end is known."""
        self._strangers = Strangers()
        """Those steps that no engine has told of."""
        self._strange_ends: dict[bytes, tuple[float, frames.RequestEnd]] = {}

    @property
    def engines(self) -> Container[Client]:
        """The processes that have told of an engine's requests or steps."""
        return self._engines

    @property
    def waiting(self) -> bool:
        """Whether anything here has a deadline."""
        return bool(self._steps or self._ending or self._strange_ends)

    def take(
        self,
        client: Client,
        frame: frames.Request | frames.Scheduled | frames.Updated | frames.Keep | frames.RequestEnd | frames.Transfers,
    ) -> None:
        """What an engine says or, of a request's end, a front end or, of steps that are kept after all, a worker.

        Raises:
            ValueError: The process has not said hello.
        """
        assembler = client.assembler
        if isinstance(frame, frames.RequestEnd):
            if assembler.counted is not None:
                assembler.counted.drops(frame.dropped)
            self._drops.put_back(frame.dropped)  # a front end has no step of its own to say it on
            self._front_end_done(frame)
            return
        if isinstance(frame, frames.Keep):
            for span_id in frame.span_ids:
                self.keep(span_id, frame.reason)
            return
        engine = self._engines.get(client)
        if engine is None:
            engine = self._engines[client] = Engine(client)
        if isinstance(frame, frames.Request):
            self._open(engine, frame)
        elif isinstance(frame, frames.Scheduled):
            engine.fill_in(frame)
            assembler.count_drops(frame.dropped)
            if assembler.counted is not None:
                assembler.counted.scheduled(frame)
            self._scheduled(engine, frame)
        elif isinstance(frame, frames.Transfers):
            self._moved(engine, frame)
        else:
            self._updated(engine, frame)

    def ran(self, client: Client, ran: Ran) -> Sequence[ReadableSpan]:
        """A rank has run its part of an engine's step; its spans, if it is known now that it is kept."""
        span_id = ran.step.parent_span_id
        step = self._step(span_id)
        if ran.step.kept:
            step.reason = step.reason or semconv.RATE
        elif ran.step.error is not None:
            self._keep(step, semconv.ERROR)
        reason, size = step.reason, step.size
        step.ranks[ran.step.rank] = ran
        if not reason:
            step.unkept.append((client, ran))
        if step.scheduled is not None:
            self._look(span_id, step)
        else:
            self._hold(client, span_id, len(ran.step.stages))
        return client.assembler.kept(ran, reason, size) if reason and ran.step.trace_id else []

    def keep(self, span_id: bytes, reason: str) -> None:
        """An engine's step is kept, though it was not chosen to be at first."""
        self._keep(self._step(span_id), reason)

    def tick(self) -> None:
        """Be done with what has waited long enough."""
        now = self._now()
        for span_id, step in [item for item in self._steps.items() if item[1].deadline <= now]:
            self._done(span_id, step)
        for request in [request for request in self._ending.values() if request.deadline <= now]:
            self._finish(request)
        for key in [key for key, (deadline, _) in self._strange_ends.items() if deadline <= now]:
            del self._strange_ends[key]

    def flush(self) -> None:
        """Wait no longer for what belongs to steps and requests that are over."""
        for span_id, step in [item for item in self._steps.items() if item[1].over]:
            self._done(span_id, step)
        for request in list(self._ending.values()):
            self._finish(request)

    def pause(self, at_ns: int) -> None:
        """Capture has been switched off: what is under way is told no further, and is shown as far as it is known."""
        for engine in self._engines.values():
            for span_id, step in list(engine.steps.items()):
                self._over(span_id, step)
            for request in list(engine.requests.values()):
                if request.engine_end_ns is None:
                    request.dismissed(at_ns)
                    self._ended(request)

    def steps(self) -> list[EngineStep]:
        """The steps that are not done with."""
        return list(self._steps.values())

    def open_requests(self) -> list[tuple[Client, frames.Request]]:
        """The requests under way: whose they are, and what announced them."""
        return [(request.client, request.frame) for request in self._requests.values()]

    def part(self, client: Client) -> None:
        """This process has gone: what its engine had under way is over, though its workers may still tell of it."""
        engine = self._engines.pop(client, None)
        if engine is None:
            return
        for span_id, step in list(engine.steps.items()):
            self._over(span_id, step)
        for request in list(engine.requests.values()):
            if not request.ending:
                self._give_up(request, semconv.REQUEST_UNFINISHED)
        for _ in engine.sends:
            self._drops.add(semconv.REQUEST_UNFINISHED)

    def drain(self) -> None:
        """Nothing more will come."""
        for client in list(self._engines):
            self.part(client)
        for span_id, step in list(self._steps.items()):
            self._done(span_id, step)
        for request in list(self._ending.values()):
            self._finish(request)
        self._strange_ends.clear()

    # Steps.

    def _scheduled(self, engine: Engine, frame: frames.Scheduled) -> None:
        requests = engine.requests
        self._waiting_and_gone(engine, frame)
        if not frame.total_tokens:
            return
        step = self._step(frame.span_id)
        if step.scheduled is not None:
            return
        self._strangers.remove(frame.span_id)
        step.client, step.scheduled = engine.client, frame
        engine.steps[frame.span_id] = step
        for number, tokens, prefill in zip(frame.requests, frame.tokens, frame.prefills, strict=True):
            request = requests.get(number)
            if request is None:
                continue
            step.parts.append(request.take_part(step, frame.opened_ns, tokens, prefill=prefill))
        if frame.kept:
            self._keep(step, semconv.RATE)
        self._look(frame.span_id, step)

    def _waiting_and_gone(self, engine: Engine, frame: frames.Scheduled) -> None:
        """What a scheduling says of requests beside the step."""
        requests = engine.requests
        for number in frame.preempted:
            if number in requests:
                requests[number].preempted(frame.scheduled_ns)
        for number in frame.ended:
            if number in requests:
                requests[number].dismissed(frame.opened_ns)
                self._ended(requests[number])
        for number, cached, fetched in zip(frame.first, frame.cached, frame.fetched, strict=True):
            if number in requests:
                requests[number].found(cached, fetched)

    def _updated(self, engine: Engine, frame: frames.Updated) -> None:
        span_id, requests = frame.span_id, engine.requests
        for number, new_tokens in zip(frame.requests, frame.new_tokens, strict=True):
            if number in requests:
                requests[number].output(span_id, new_tokens)
        scheduled = engine.steps[span_id].scheduled if frame.each and span_id in engine.steps else None
        for number in () if scheduled is None else scheduled.requests:
            if number in requests:
                requests[number].output(span_id, frame.each)
        if frame.total_drafted:
            for number, drafted, accepted in zip(frame.requests, frame.drafted, frame.accepted, strict=True):
                if number in requests:
                    requests[number].drafts_verified(drafted, accepted)
        self._finished(engine, frame)

    def _finished(self, engine: Engine, frame: frames.Updated) -> None:
        """The end of a step whose output was taken in, and of the requests that are over with it."""
        span_id, requests = frame.span_id, engine.requests
        for number in frame.finished:
            if number in requests:
                requests[number].finished(span_id, frame.closed_ns)
        if span_id in engine.steps:
            if frame.keep:
                self._keep(engine.steps[span_id], frame.keep)
            engine.steps[span_id].updated = frame
            # Outputs are taken in in order: a step before it that has had none will have none.
            earlier = list(engine.steps)
            for each in earlier[: earlier.index(span_id) + 1]:
                self._over(each, engine.steps[each])
        for number in frame.finished:
            if number in requests:
                self._ended(requests[number])

    def _step(self, span_id: bytes) -> EngineStep:
        """The record of this step, made by whoever tells of it first."""
        step = self._steps.get(span_id)
        if step is None:
            step = self._steps[span_id] = EngineStep()
            step.deadline = self._now() + STRANGER_SECONDS
        return step

    def _keep(self, step: EngineStep, reason: str) -> None:
        if step.reason:
            return
        step.reason = reason
        for client, ran in step.unkept:
            if ran.step.trace_id:
                self._put(client.assembler.kept(ran, reason, step.size), client.account)
        step.unkept = []

    def _hold(self, client: Client, span_id: bytes, stages: int) -> None:
        """No engine has told of it yet, and perhaps none will: a relay on another host hears of the slow ones alone."""
        self._strangers.add(span_id, client, stages)
        while self._strangers.stages > HELD_STAGES:
            self._drops.add(semconv.TOO_MANY_HELD)
            given_up = self._strangers.first_to_go()
            self._done(given_up, self._steps[given_up])

    def _look(self, span_id: bytes, step: EngineStep) -> None:
        """Something new is known of a scheduled step."""
        if not step.settled and step.decisive() is not None:
            self._settle(step)
        if not step.over:
            step.deadline = self._now() + (SILENT_SECONDS if step.settled else RUNNING_SECONDS)
        elif step.complete:
            self._done(span_id, step)

    def _over(self, span_id: bytes, step: EngineStep) -> None:
        """The engine is done with a step; its ranks may have still to tell."""
        step.over = True
        step.deadline = self._now() + RANKS_SECONDS
        self._forget_step(span_id, step)
        if step.complete:
            self._done(span_id, step)

    def _settle(self, step: EngineStep) -> None:
        step.settle()
        for part in step.parts:
            request = self._requests.get(part.request.frame.key)
            if request is part.request:  # it is followed still
                request.settled()
                if request.complete:
                    self._finish(request)

    def _done(self, span_id: bytes, step: EngineStep) -> None:
        """Forget a step and, if it is a trace, make its span."""
        del self._steps[span_id]
        self._strangers.remove(span_id)
        client, scheduled = step.client, step.scheduled
        if client is None or scheduled is None:
            return
        self._forget_step(span_id, step)
        if not step.settled:
            self._settle(step)
        self._count_straggler(client, step)
        if step.reason and scheduled.trace_id:
            self._put(Unmade(lambda: self._span(step), gives_way=1, given_up=step.release), client.account)
        else:
            step.release()

    def _forget_step(self, span_id: bytes, step: EngineStep) -> None:
        """Its engine has no more to do with it, if it is there still."""
        engine = None if step.client is None else self._engines.get(step.client)
        if engine is not None:
            engine.steps.pop(span_id, None)

    def _span(self, step: EngineStep) -> list[ReadableSpan]:
        span = step.span(self._wall.offset_ns())
        step.release()
        return [span]

    def _count_straggler(self, client: Client, step: EngineStep) -> None:
        counted = client.assembler.counted
        late = None if counted is None else step.straggler()
        if counted is not None and late is not None and step.scheduled is not None:
            counted.straggled(step.scheduled.kind, late.skew_ns, step.ranks[late.rank])

    # Requests.

    def _moved(self, engine: Engine, frame: frames.Transfers) -> None:
        """KV cache of requests is on its way, or has arrived."""
        requests = engine.requests
        for number, tokens in zip(frame.loading, frame.tokens, strict=True):
            if number in requests:
                requests[number].loading(frame.at_ns, tokens, frame.connector)
        for number in frame.failed:
            if number in requests:
                requests[number].load_failed(frame.at_ns)
        for number in frame.loaded:
            if number in requests:
                requests[number].loaded(frame.at_ns)
        for number in frame.sending:
            if number in requests and len(engine.sends) < MAX_REQUESTS:
                engine.sends[number] = requests[number].frame, frame.at_ns
        sent = [engine.sends.pop(number) for number in frame.sent if number in engine.sends]
        if sent:
            self._put(Unmade(lambda: self._send_spans(engine.client, frame, sent)), engine.client.account)

    def _send_spans(
        self, client: Client, frame: frames.Transfers, sent: list[tuple[frames.Request, int]]
    ) -> list[ReadableSpan]:
        from otel_npu.relay.request_spans import send_span

        return [send_span(client, *each, frame, self._wall.offset_ns()) for each in sent]

    def _open(self, engine: Engine, frame: frames.Request) -> None:
        for known in (self._requests.get(frame.key), engine.requests.get(frame.number)):
            if known is not None and not known.forgotten:
                self._give_up(known, semconv.REQUEST_UNFINISHED)
        if len(self._requests) >= MAX_REQUESTS:
            most = max(self._engines.values(), key=lambda each: len(each.requests))
            if len(most.requests) <= len(engine.requests):  # this one: it will wait, while the others run
                self._drops.add(semconv.TOO_MANY_REQUESTS)
                engine.client.account.lose()
                return
            self._give_up(next(reversed(most.requests.values())), semconv.TOO_MANY_REQUESTS)
        request = OpenRequest(engine.client, frame)
        self._requests[frame.key] = engine.requests[frame.number] = request
        _, end = self._strange_ends.pop(frame.key, (0.0, None))
        if end is not None:
            self._front_end_done(end)

    def _front_end_done(self, frame: frames.RequestEnd) -> None:
        request = self._requests.get(frame.key)
        if request is None:
            self._strange_ends[frame.key] = self._now() + STRANGER_SECONDS, frame
        elif request.end is None:
            request.end = frame
            self._ended(request)

    def _ended(self, request: OpenRequest) -> None:
        """An end of the request is known, or the other one too."""
        if request.frame.key not in self._ending:
            self._ending[request.frame.key] = request
            request.deadline = self._now() + END_SECONDS
        if request.complete:
            self._finish(request)

    def _finish(self, request: OpenRequest) -> None:
        self._forget(request)
        self._put(Unmade(lambda: self._spans(request), given_up=request.let_go), request.client.account)

    def _spans(self, request: OpenRequest) -> list[ReadableSpan]:
        from otel_npu.relay.request_spans import request_spans  # with the SDK, which is imported while frames are read

        spans = request_spans(request, self._wall.offset_ns())
        counted = request.client.assembler.counted
        if counted is not None:
            reason = None if request.end is None else request.end.reason
            counted.request(reason, request.device_ns, request.attributed_ns, spans, time.time_ns())
        return spans

    def _give_up(self, request: OpenRequest, reason: str) -> None:
        self._forget(request)
        request.let_go()
        self._drops.add(reason)
        request.client.account.lose()

    def _forget(self, request: OpenRequest) -> None:
        request.forgotten = True
        del self._requests[request.frame.key]
        engine = self._engines.get(request.client)
        if engine is not None:
            engine.requests.pop(request.frame.number, None)
        self._ending.pop(request.frame.key, None)
