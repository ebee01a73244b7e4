"""The engine that the demo traces: continuous batching on a simulated NPU, told to the relay as vLLM's is.

It says what the plugin for vLLM says, in the same frames: requests when they arrive, steps when they are scheduled and
when their output is taken in. Only the model is missing.
"""

from __future__ import annotations

import itertools
import random
import time
from time import perf_counter_ns
from typing import TYPE_CHECKING, Final

import otel_npu
from otel_npu import semconv
from otel_npu.capture import context
from otel_npu.capture.records import Rank, new_step
from otel_npu.capture.steps import Step
from otel_npu.slow import SlowSteps
from otel_npu.wire import frames

if TYPE_CHECKING:
    from collections.abc import Callable

    from otel_npu.capture.recorder import Recorder
    from otel_npu.cli.demo.workload import Request
    from otel_npu.devices.simulated import SimulatedNpu

_MAX_BATCH: Final = 16
_MAX_TOKENS: Final = 1024  # in one step: longer prompts come in pieces
_STALL_MS: Final = 300.0  # of an all-reduce that waits for a late peer
_HOST_SECONDS: Final = 0.0003  # scheduling and detokenising between two steps
_SPREAD: Final = 0.02
# How a forward divides into what is inside it.
_ATTENTION, _MLP, _ALL_REDUCE = 0.34, 0.55, 0.11
_PREFILL, _DECODE, _MIXED = "prefill", "decode", "mixed"


class Engine:
    """Serves requests, step by step.

    Args:
        npu: Where the stages run.
        recorder: What captures them.
        seed: Of the noise in their times.
        ended: Told of each request that is over, and why.
    """

    def __init__(self, npu: SimulatedNpu, recorder: Recorder, seed: int, ended: Callable[[Request, str], None]) -> None:
        self._npu = npu
        self._recorder = recorder
        self._random = random.Random(seed)  # noqa: S311  noise, not secrets
        self._ended = ended
        self._limiter = context.Limiter(recorder.settings.steps_per_second)
        self._slow_steps = SlowSteps(recorder.settings.slow_step, recorder.drops)
        self._step_numbers, self._numbers = itertools.count(1), itertools.count(1)
        self._requests: dict[int, Request] = {}
        """By the number that the relay knows each by, in the order of arrival."""
        self._aborted: list[int] = []
        self._launched_ns = 0
        """How long the step takes on the NPU: by that it is judged, for the host may have better things to do."""

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._requests

    def add(self, request: Request) -> None:
        """A request arrives."""
        request.arrived_unix_ns = time.time_ns()
        number = next(self._numbers)
        self._requests[number] = request
        self._recorder.send(
            frames.Request(
                request.key,
                number,
                request.trace_id,
                request.key,
                request.request_id,
                request.arrived_unix_ns,
                response_id=request.response_id,
                detail=self._recorder.settings.request_spans == "detail",
            )
        )

    def run_step(self) -> None:
        """Schedule a step, run it until its tokens are there, and hand them out."""
        opened_ns = perf_counter_ns()
        served = self._scheduled()
        prefills = {
            number for number in served if self._requests[number].computed < self._requests[number].prompt_tokens
        }
        kind = _DECODE if not prefills else _MIXED if len(prefills) < len(served) else _PREFILL
        ids = context.new_root(kept=self._limiter.allow(kind))
        step_number = next(self._step_numbers)
        aborted, self._aborted = self._aborted, []
        self._recorder.send(
            frames.Scheduled(
                trace_id=ids.trace_id,
                span_id=ids.span_id,
                number=step_number,
                kind=kind,
                opened_ns=opened_ns,
                scheduled_ns=perf_counter_ns(),
                ranks=1,
                total_tokens=sum(served.values()),
                total_requests=len(served),
                requests=list(served),
                tokens=list(served.values()),
                prefills=[number in prefills for number in served],
                preempted=[],
                ended=aborted,
                dropped={},
                kept=ids.kept,
            )
        )
        stalled = any(self._stalls(self._requests[number]) for number in served)
        self._run(kind, step_number, ids, sum(served.values()), stalled=stalled)
        step_kind = kind, sum(served.values()).bit_length()
        is_slow = self._slow_steps.judge(step_kind, self._launched_ns, kept=ids.kept)
        self._update(ids.span_id, served, prefills, semconv.SLOW if is_slow else "")
        time.sleep(_HOST_SECONDS)

    def _scheduled(self) -> dict[int, int]:
        """Whom the next step serves, and with how many tokens: answers first, then as much of prompts as fits."""
        running = list(self._requests.items())[:_MAX_BATCH]
        served = {number: 1 for number, request in running if request.computed == request.prompt_tokens}
        left = _MAX_TOKENS - len(served)
        for number, request in running:
            if request.computed < request.prompt_tokens and left:
                served[number] = min(left, request.prompt_tokens - request.computed)
                left -= served[number]
        return served

    def _stalls(self, request: Request) -> bool:
        stalls = request.is_stalled and request.has_begun
        request.is_stalled = request.is_stalled and not stalls
        return stalls

    def _run(self, kind: str, number: int, ids: context.Ids, tokens: int, *, stalled: bool) -> None:
        own = context.child_of(ids.trace_id, ids.span_id, kept=ids.kept)
        step = new_step(Step, self._recorder, kind, (), None, own, Rank(0, returns_output=True))
        step.open()
        step.number = number
        self._launched_ns = 0
        forward_ms = (8.0 if kind == _DECODE else 12.0) + 0.02 * tokens
        with otel_npu.stage("prepare_input"):
            self._launch(0.6)
        with otel_npu.stage("forward"):
            with otel_npu.stage("attention"):
                self._launch(_ATTENTION * forward_ms)
            with otel_npu.stage("mlp"):
                self._launch(_MLP * forward_ms)
            with otel_npu.stage("all_reduce"):
                self._launch(_ALL_REDUCE * forward_ms + (_STALL_MS if stalled else 0.0))
        with otel_npu.stage("sample"):
            self._launch(0.4)
        self._npu.synchronize()
        step.close()

    def _launch(self, milliseconds: float) -> None:
        duration_ns = round(milliseconds * 1e6 * max(0.5, self._random.gauss(1, _SPREAD)))
        self._launched_ns += duration_ns
        self._npu.launch(duration_ns)

    def _update(self, span_id: bytes, served: dict[int, int], prefills: set[int], keep: str) -> None:
        """Hand out the tokens of a step; whose prompt is not computed yet gets none. `keep`: why it is a trace now."""
        given: dict[int, int] = {}
        finished: list[int] = []
        for number, tokens in served.items():
            request = self._requests[number]
            if number in prefills:
                request.computed += tokens
                if request.computed < request.prompt_tokens:
                    continue
            request.generated += 1
            request.first_token_unix_ns = request.first_token_unix_ns or time.time_ns()
            given[number] = 1
            if request.has_ended:
                finished.append(number)
        new_tokens = list(given.values())
        self._recorder.send(frames.Updated(span_id, perf_counter_ns(), list(given), new_tokens, finished, keep))
        for number in finished:
            self._end(number, "length")
        for number in [number for number in given if number in self._requests]:
            if self._requests[number].hangs_up and self._requests[number].has_begun:
                self._aborted.append(number)
                self._end(number, "abort")

    def _end(self, number: int, reason: str) -> None:
        request = self._requests.pop(number)
        self._recorder.send(frames.RequestEnd(request.key, time.time_ns(), request.generated, reason, {}))
        self._ended(request, reason)
