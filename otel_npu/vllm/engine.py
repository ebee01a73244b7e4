"""What an engine's scheduler does, told to the relay: which requests there are, and which step serves which."""

from __future__ import annotations

import functools
import itertools
import logging
from collections import deque
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from otel_npu import semconv
from otel_npu.capture import context
from otel_npu.ids import new_bytes
from otel_npu.native import native
from otel_npu.slow import SlowSteps
from otel_npu.vllm import tracing
from otel_npu.vllm.arrival import announced
from otel_npu.vllm.transfers import TransferLog
from otel_npu.vllm.usage import Verified, cached_tokens
from otel_npu.wire import channel, frames

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from otel_npu.capture.recorder import Recorder

_log = logging.getLogger("otel_npu")

STEP_ATTRIBUTE: Final = "_otel_npu_step"
"""What the scheduler's output carries to every worker of the engine, and back to the scheduler."""
WORKER_ATTRIBUTE: Final = "_otel_npu_steps"
"""Where a worker has what follows its steps."""

_request_numbers: Final = itertools.count(1)
"""Of the process, whose connection tells the requests of all its engines."""

_MAX_RUNNING: Final = 64
_LIST_EVERY: Final = 64
_NO_DROPS: Final[dict[str, int]] = {}
_NOTHING_LISTED: Final[_Lists] = ([], [], [])
_NOTHING_FOUND: Final[tuple[list[int], list[int], list[int], int, int]] = ([], [], [], 0, 0)
_MIXED: Final = "mixed"
_PREFILL: Final = "prefill"
_DECODE: Final = "decode"


_Lists: TypeAlias = "tuple[list[int], list[int], list[bool]]"

StepContext: TypeAlias = tuple[bytes, bytes, int, str, bool, tuple[bytes, ...]]
"""The context of an engine's step, pickled with each scheduler output: its trace id, without which it is never a trace,
its span id, number and kind, whether it is kept, and the span ids of steps before it that turned out to be slow: kept,
though they were not at first."""


if TYPE_CHECKING or native is None:

    class ListedRecord:
        """What is to be known of the requests of a step when the next one may be for the same.

        Attributes:
            kind: What the step does.
            span_id: The step that they were listed with; None before that.
            tokens: Of each request how many of its tokens were scheduled.
            repeated: How many steps were compared with it.
        """

        __slots__ = ("kind", "repeated", "span_id", "tokens")

        kind: str
        span_id: bytes | None
        tokens: dict[str, int]
        repeated: int

    class EngineRecord:
        """What is to be known of an engine when a usual step of it begins and has its output.

        Attributes:
            channel: Where frames go.
            frame: Makes the frame of a step that has been scheduled.
            limiter: How many steps a second are kept.
            listed: The requests of the last step, if they all decode.
            running: The steps whose output is still to come, by span id, in the order of scheduling.
            slow: What the workers are to be told with the next step.
            step_numbers: The numbers of steps to come.
            told: What the steps are told to, once all of this is there.
            unsent: The drop counts that are to go with the next frame.
            word: Makes the frame of a step that has its output.
        """

        channel: channel.Channel | None
        frame: Callable[..., frames.Scheduled]
        limiter: context.Limiter | None
        listed: _Listed | None
        running: dict[bytes, _Running]
        slow: deque[bytes]
        step_numbers: itertools.count[int]
        told: Recorder | None
        unsent: dict[str, int]
        word: Callable[..., frames.Updated]

else:
    ListedRecord, EngineRecord = native.ListedRecord, native.EngineRecord


class _Listed(ListedRecord):
    """The requests of a step, and of those after it that are the same: as in most steps, all of them decode.

    Attributes:
        lists: Of each sampled request its number, its tokens, and whether they are of its prompt.
    """

    __slots__ = ("lists",)

    def __init__(self, kind: str, tokens: dict[str, int], lists: _Lists) -> None:
        self.kind = kind
        self.lists = lists
        self.span_id = None
        self.tokens = tokens
        self.repeated = 0

    def like(self, tokens: dict[str, int]) -> bool:
        """Whether the next step is the same. Now and then it is listed all the same: the list may have been lost."""
        self.repeated += 1
        return self.repeated < _LIST_EVERY and tokens == self.tokens

    def each_has_one(self, outputs: Sequence[Any]) -> bool:
        """Whether the output of the step is a token for each of its requests, of which none is finished."""
        if len(outputs) != len(self.tokens):
            return False
        tokens = self.tokens
        for output in outputs:
            if output.finish_reason is not None or len(output.new_token_ids) != 1 or output.request_id not in tokens:
                return False
        return True


_Running: TypeAlias = tuple[int, tuple[str, int], bool, _Listed]
"""A step whose output is still to come: when it was opened, what it is compared with, whether it is kept, for whom."""


class _Member:
    """A request that the scheduler has: only a sampled one has a number, by which the relay knows it."""

    __slots__ = ("number", "prefill_tokens", "request", "scheduled")

    def __init__(self, request: Any, number: int | None) -> None:
        self.request = request
        self.number = number
        self.prefill_tokens = _prefill_tokens(request)
        self.scheduled = False


class EngineSteps(EngineRecord):
    """Follows one engine's scheduler.

    Args:
        scheduler: The scheduler; its methods are wrapped on this object, because subclasses replace them.
        vllm_config: Its configuration.
    """

    def __init__(self, scheduler: Any, vllm_config: Any) -> None:
        self._endpoint = tracing.config_endpoint(vllm_config)
        tracing.recorder(self._endpoint)  # now: a relay takes a moment to start
        self._ranks = _world_size(vllm_config)
        self._pipeline = int(getattr(vllm_config.parallel_config, "pipeline_parallel_size", 1))
        self._bonus_tokens: int = getattr(scheduler, "num_sampled_tokens_per_step", 1)
        self._members: dict[str, _Member] = {}
        self._requests: Any = getattr(scheduler, "requests", {})
        self.step_numbers = itertools.count(1)
        self.channel = self.limiter = self.listed = self.told = None
        self.running = {}
        self.slow = deque()
        self.frame, self.word = self._frame, self._word
        self._slow_steps: SlowSteps | None = None
        self._updated_ns = 0
        for name, wrap in (
            ("add_request", self._around_add_request),
            ("schedule", self._around_schedule),
            ("update_from_output", self._around_update),
        ):
            method = getattr(scheduler, name, None)
            if callable(method):
                setattr(scheduler, name, functools.wraps(method)(wrap(method)))
            else:
                _log.warning("vLLM's %s has no %s: what it told is missing", type(scheduler).__name__, name)
        connector = getattr(scheduler, "connector", None)
        self._transfers = None if connector is None else TransferLog(scheduler, self._number, self._recorder)

    def _around_add_request(self, add_request: Callable[..., Any]) -> Callable[..., Any]:
        add = tracing.guarded(self._add)

        def call(request: Any, *args: Any, **kwargs: Any) -> Any:
            add(request)  # first: the scheduler may refuse it, and then it has an end without a step
            return add_request(request, *args, **kwargs)

        return call

    def _around_schedule(self, schedule: Callable[..., Any]) -> Callable[..., Any]:
        if native is not None:
            return native.around_schedule(schedule, tracing.guarded(self._scheduled), self)  # type: ignore[no-any-return]

        def call(*args: Any, **kwargs: Any) -> Any:
            opened_ns = perf_counter_ns()
            output = schedule(*args, **kwargs)
            try:
                self._scheduled(output, opened_ns)
            except Exception:
                tracing.fault()
            return output

        return call

    def _around_update(self, update_from_output: Callable[..., Any]) -> Callable[..., Any]:
        verified = tracing.guarded(self._verified)

        def call(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            drafts = None
            if getattr(scheduler_output, "scheduled_spec_decode_tokens", None):
                drafts = verified(scheduler_output, args[0] if args else kwargs.get("model_runner_output"))
            result = update_from_output(scheduler_output, *args, **kwargs)
            try:
                self._updated(scheduler_output, drafts, result)
            except Exception:
                tracing.fault()
            return result

        if native is not None:
            return native.around_update(update_from_output, call, tracing.guarded(self._updated), self)  # type: ignore[no-any-return]
        return call

    def _add(self, request: Any) -> None:
        recorder = self._recorder()
        if recorder is None or request.request_id in self._requests:  # the next input of a streaming session
            return
        told = announced(getattr(request, "trace_headers", None))
        self._members[request.request_id] = member = _Member(request, next(_request_numbers) if told else None)
        if told is not None and member.number is not None:
            recorder.defer(
                _NO_DROPS,
                frames.Request,
                told.key,
                member.number,
                told.trace_id,
                told.parent_span_id,
                told.request_id,
                int(request.arrival_time * 1e9),
                told.response_id,
                recorder.settings.request_spans == "detail",
            )

    def _scheduled(self, output: Any, opened_ns: int) -> None:
        recorder = tracing.recorder(self._endpoint)
        if recorder is None:
            self._members.clear()
            self.listed = self.told = None
            return
        scheduled_ns = perf_counter_ns()
        if self._transfers is not None:
            self._transfers.scheduled()
        gone = output.finished_req_ids
        ended = self._gone(gone) if gone else []
        total_tokens = output.total_num_scheduled_tokens
        if not total_tokens:
            if ended:
                dropped = recorder.drops.take_unsent()
                recorder.defer(dropped, self._nothing_scheduled, opened_ns, scheduled_ns, ended, dropped)
            return
        new, preempted = output.scheduled_new_reqs, getattr(output, "preempted_req_ids", None)
        listed = self.listed
        if gone or new or preempted or listed is None or not listed.like(output.num_scheduled_tokens):
            listed = self._list(output.num_scheduled_tokens)
        kind = listed.kind
        ids = new_bytes(24)
        trace_id, span_id = ids[8:] if recorder.settings.root_traces else b"", ids[:8]
        kept = self._kept(recorder, kind)
        slow: tuple[bytes, ...] = ()
        if self.slow:
            slow = tuple(self.slow.popleft() for _ in range(len(self.slow)))
        self.running[span_id] = (opened_ns, (kind, total_tokens.bit_length()), kept, listed)
        if len(self.running) > _MAX_RUNNING:  # of those before them no output will come
            del self.running[next(iter(self.running))]
        number = next(self.step_numbers)
        context_of_step: StepContext = (trace_id, span_id, number, kind, kept, slow)
        setattr(output, STEP_ATTRIBUTE, context_of_step)
        dropped = recorder.drops.take_unsent()
        recorder.defer(
            dropped,
            self._frame,
            trace_id,
            span_id,
            number,
            kind,
            opened_ns,
            scheduled_ns,
            total_tokens,
            len(output.num_scheduled_tokens),
            kept,
            listed.span_id or b"",
            listed.lists if listed.span_id is None else _NOTHING_LISTED,
            self._numbers(preempted) if preempted else [],
            ended,
            dropped,
            self._found(new) if new else _NOTHING_FOUND,
        )
        if listed.span_id is None:
            listed.span_id = span_id
        if self._transfers is None:  # else there is more to do
            self.told, self.channel, self.unsent = recorder, recorder.channel, recorder.drops.unsent

    def _frame(
        self,
        trace_id: bytes,
        span_id: bytes,
        number: int,
        kind: str,
        opened_ns: int,
        scheduled_ns: int,
        total_tokens: int,
        total_requests: int,
        kept: bool,
        like: bytes,
        lists: _Lists = _NOTHING_LISTED,
        preempted: Sequence[int] = (),
        ended: Sequence[int] = (),
        dropped: dict[str, int] = _NO_DROPS,
        found: tuple[list[int], list[int], list[int], int, int] = _NOTHING_FOUND,
    ) -> frames.Scheduled:
        """What the relay is told of a step that has been scheduled."""
        requests, tokens, prefills = lists
        return frames.Scheduled(
            trace_id,
            span_id,
            number,
            kind,
            opened_ns,
            scheduled_ns,
            self._ranks,
            total_tokens,
            total_requests,
            requests,
            tokens,
            prefills,
            [*preempted],
            [*ended],
            dropped,
            kept,
            self._pipeline,
            *found,
            like,
        )

    def _gone(self, request_ids: Iterable[str]) -> list[int]:
        """The numbers of requests that have left the engine without an output that said so."""
        members = [self._members.pop(request_id, None) for request_id in request_ids]
        return [member.number for member in members if member is not None and member.number is not None]

    def _nothing_scheduled(
        self, opened_ns: int, scheduled_ns: int, ended: list[int], dropped: dict[str, int]
    ) -> frames.Scheduled:
        """Word of requests that have ended, where there is no step to say it with."""
        return frames.Scheduled(
            b"", new_bytes(8), 0, _DECODE, opened_ns, scheduled_ns, self._ranks, 0, 0, [], [], [], [], ended,
            dropped, kept=False, pipeline=self._pipeline,
        )  # fmt: skip

    def _list(self, scheduled_tokens: dict[str, int]) -> _Listed:
        """The sampled requests of a step. Remembered, if the next step may be the same."""
        requests: list[int] = []
        tokens: list[int] = []
        prefills: list[bool] = []
        any_prefill = any_decode = False
        for request_id, count in scheduled_tokens.items():
            member = self._members.get(request_id) or self._catch_up(request_id)
            if member is None:
                continue
            # The scheduler has already counted these tokens as computed.
            prefill = member.request.num_computed_tokens - count < member.prefill_tokens
            if prefill:
                any_prefill = True
            else:
                any_decode = True
            if member.number is not None:
                requests.append(member.number)
                tokens.append(count)
                prefills.append(prefill)
        kind = _MIXED if any_prefill and any_decode else _PREFILL if any_prefill else _DECODE
        listed = _Listed(kind, dict(scheduled_tokens), (requests, tokens, prefills))
        self.listed = None if any_prefill else listed
        return listed

    def _catch_up(self, request_id: str) -> _Member | None:
        """A request that came while capture was off: the relay does not know it, but its steps are of some kind."""
        request = self._requests.get(request_id)
        if request is None:
            return None
        member = self._members[request_id] = _Member(request, None)
        member.scheduled = True
        return member

    def _found(self, scheduled_new_reqs: Any) -> tuple[list[int], list[int], list[int], int, int]:
        """What the caches had of the prompts that are scheduled for the first time, as in the frame."""
        first: list[int] = []
        cached: list[int] = []
        fetched: list[int] = []
        total_cached = total_fetched = 0
        for new in scheduled_new_reqs:
            member = self._members.get(new.req_id)
            if member is None or member.scheduled:  # it may be new to a worker, after a preemption
                continue
            member.scheduled = True
            here, elsewhere = cached_tokens(member.request)
            total_cached += here
            total_fetched += elsewhere
            if member.number is not None:
                first.append(member.number)
                cached.append(here)
                fetched.append(elsewhere)
        return first, cached, fetched, total_cached, total_fetched

    def _verified(self, scheduler_output: Any, model_runner_output: Any) -> Verified:
        """What came of a step's drafts."""
        return Verified(scheduler_output, model_runner_output, self._bonus_tokens)

    def _updated(self, scheduler_output: Any, verified: Verified | None, result: Any) -> None:
        step = getattr(scheduler_output, STEP_ATTRIBUTE, None)
        recorder = tracing.recorder(self._endpoint)
        if step is None or recorder is None:
            return
        updated_ns = perf_counter_ns()
        span_id = step[1]
        running = self.running.pop(span_id, None)
        outputs = result.values() if isinstance(result, dict) else (result,)
        if verified is None and running is not None and len(outputs) == 1:
            (only,) = outputs
            if running[3].each_has_one(only.outputs):
                recorder.defer(_NO_DROPS, self._word, recorder, span_id, updated_ns, running, 1)
                return
        told = self._told(verified, outputs)
        recorder.defer(_NO_DROPS, self._word, recorder, span_id, updated_ns, running, 0, *told)
        if not told[2] or self._members:  # with the next steps, or by the idle thread
            return
        thread = recorder.local.thread
        if thread.pending:
            # Its worker is this thread too. Nobody closes a step after a request's last one, and a program that ends
            # may keep the idle thread waiting for longer than the relay waits for that step.
            recorder.resolve(thread)
        recorder.send_deferred()

    def _word(
        self,
        recorder: Recorder,
        span_id: bytes,
        updated_ns: int,
        running: _Running | None,
        each: int,
        requests: Sequence[int] = (),
        new_tokens: Sequence[int] = (),
        finished: Sequence[int] = (),
        totals: tuple[Any, ...] = (),
    ) -> frames.Updated:
        """What the relay is told of a step's output."""
        keep = "" if running is None else self._judge(recorder, span_id, running, updated_ns)
        drafted, accepted, total_drafted, total_accepted = totals or ([], [], 0, 0)
        return frames.Updated(
            span_id,
            updated_ns,
            [*requests],
            [*new_tokens],
            [*finished],
            keep,
            drafted,
            accepted,
            total_drafted,
            total_accepted,
            each,
        )

    def _told(self, verified: Verified | None, results: Iterable[Any]) -> tuple[Any, ...]:
        """What came of a step, request by request: as `_word` takes it."""
        requests: list[int] = []
        new_tokens: list[int] = []
        finished: list[int] = []
        drafted: list[int] = []
        accepted: list[int] = []
        members = self._members
        for outputs in results:
            for output in outputs.outputs:
                member = members.get(output.request_id)
                if member is None:
                    continue
                if output.finish_reason is not None:
                    del members[output.request_id]
                counts = None if verified is None else verified.take(output.request_id)
                if member.number is not None:
                    requests.append(member.number)
                    if counts is not None:
                        drafted.append(counts[0])
                        accepted.append(counts[1])
                    new_tokens.append(len(output.new_token_ids))
                    if output.finish_reason is not None:
                        finished.append(member.number)
        totals = () if verified is None else (drafted, accepted, verified.drafted, verified.accepted)
        return requests, new_tokens, finished, totals

    def _recorder(self) -> Recorder | None:
        return tracing.recorder(self._endpoint)

    def _number(self, request_id: str) -> int | None:
        member = self._members.get(request_id)
        return None if member is None else member.number

    def _kept(self, recorder: Recorder, kind: str) -> bool:
        """Whether a step of this kind is a trace: decided here, once, for all ranks and hosts."""
        if self.limiter is None:
            self.limiter = context.Limiter(recorder.settings.steps_per_second)
        return recorder.settings.root_traces and self.limiter.allow(kind)

    def _judge(self, recorder: Recorder, span_id: bytes, running: _Running, updated_ns: int) -> str:
        """Why a step is kept now that its output is there; empty if it is not, or was from the start.

        It is judged by what it added to the time before it: the step behind a slow one is not to blame.
        """
        if not recorder.settings.root_traces:
            return ""
        if self._slow_steps is None:
            self._slow_steps = SlowSteps(recorder.settings.slow_step, recorder.drops)
        opened_ns, kind, kept, _ = running
        added_ns = updated_ns - max(opened_ns, self._updated_ns)
        self._updated_ns = updated_ns
        if not self._slow_steps.judge(kind, added_ns, kept=kept):
            return ""
        self.slow.append(span_id)
        return semconv.SLOW

    def _numbers(self, request_ids: Any) -> list[int]:
        numbers = [self._number(request_id) for request_id in request_ids]
        return [number for number in numbers if number is not None]


if native is not None:
    native.use_hooks(
        WORKER_ATTRIBUTE,
        STEP_ATTRIBUTE,
        tracing.fault_of,
        channel.MOST_DEFERRED,
        channel.DEFERRED_NS,
        _LIST_EVERY,
        _MAX_RUNNING,
    )


def follow(init: Callable[..., Any]) -> Callable[..., Any]:
    """`Scheduler.__init__`: follow the scheduler that is made.

    Not `EngineCore.__init__`: in a process of its own the engine loads the plugins from inside that.
    """
    begin = tracing.guarded(EngineSteps)

    def __init__(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        init(self, vllm_config, *args, **kwargs)
        begin(self, vllm_config)

    return __init__


def _prefill_tokens(request: Any) -> int:
    """How many tokens of a request are its prefill here; where another engine did it, its last token alone is left."""
    transfer = getattr(request, "kv_transfer_params", None)
    remote = isinstance(transfer, dict) and bool(transfer.get("do_remote_prefill"))
    prompt_tokens: int = request.num_prompt_tokens
    return prompt_tokens - 1 if remote else prompt_tokens


def _world_size(vllm_config: Any) -> int:
    parallel = getattr(vllm_config, "parallel_config", None)
    if getattr(parallel, "distributed_executor_backend", None) == "external_launcher":
        return 1  # each process schedules for itself
    return int(getattr(parallel, "world_size", 1))
