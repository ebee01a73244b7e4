"""What is told of an engine's scheduler, on a scheduler of the same shape as vLLM's."""

from __future__ import annotations

import contextlib
import itertools
import types
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest

import otel_npu
from otel_npu.capture.context import Limiter
from otel_npu.vllm import engine
from otel_npu.vllm.arrival import KEY, Announced
from otel_npu.vllm.usage import cached_tokens
from otel_npu.wire import frames
from tests.helpers.capturing import capturing, wait_until
from tests.helpers.true_time import stage_clock

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.helpers.capturing import Captured

CONFIG: Any = types.SimpleNamespace(parallel_config=types.SimpleNamespace(world_size=2))


class Scheduler:
    """Schedules what a test says."""

    def __init__(self) -> None:
        self.finished: set[str] = set()
        self.requests: dict[str, Any] = {}
        self.seen: set[str] = set()
        self.drafts: dict[str, list[int]] = {}

    def add_request(self, request: Any) -> None:
        self.requests[request.request_id] = request

    def schedule(self, tokens: dict[str, int], preempted: tuple[str, ...] = ()) -> Any:
        for request_id, count in tokens.items():
            self.requests[request_id].num_computed_tokens += count
        new = [request_id for request_id in tokens if request_id not in self.seen]
        self.seen |= tokens.keys()
        finished, self.finished = self.finished, set()
        return types.SimpleNamespace(
            num_scheduled_tokens=tokens,
            total_num_scheduled_tokens=sum(tokens.values()),
            finished_req_ids=finished,
            preempted_req_ids=set(preempted),
            scheduled_new_reqs=[types.SimpleNamespace(req_id=request_id) for request_id in new],
            scheduled_spec_decode_tokens=self.drafts,
        )

    def update_from_output(self, scheduler_output: Any, outputs: dict[str, tuple[int, str | None]]) -> dict[int, Any]:
        for row in getattr(outputs, "sampled_token_ids", []):
            del row[1:]  # as vLLM does with what is behind a request's end
        self.finished |= {request_id for request_id, (_, reason) in outputs.items() if reason}
        return {
            0: types.SimpleNamespace(
                outputs=[
                    types.SimpleNamespace(request_id=request_id, new_token_ids=[5] * count, finish_reason=reason)
                    for request_id, (count, reason) in outputs.items()
                ]
            )
        }


def request(request_id: str, prompt_tokens: int = 4, *, sampled: bool = True, remote: bool = False) -> Any:
    told = Announced(request_id.encode().rjust(8, b"k"), b"T" * 16, b"P" * 8, f"user's {request_id}")
    return types.SimpleNamespace(
        request_id=request_id,
        trace_headers={KEY: told.header()} if sampled else None,
        arrival_time=12.5,
        num_prompt_tokens=prompt_tokens,
        num_computed_tokens=prompt_tokens - 1 if remote else 0,
        kv_transfer_params={"do_remote_prefill": True} if remote else None,
    )


@pytest.fixture(autouse=True)
def numbers_from_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process of its own."""
    monkeypatch.setattr(engine, "_request_numbers", itertools.count(1))


@pytest.fixture
def scheduler(captured: Captured) -> Iterator[Scheduler]:
    scheduler = Scheduler()
    engine.EngineSteps(scheduler, CONFIG)
    return scheduler  # type: ignore[return-value]


def told(captured: Captured, kind: type) -> list[Any]:
    captured.finish()
    return [frame for frame in captured.sent if isinstance(frame, kind)]


def test_a_sampled_request_is_told_once_when_it_reaches_the_engine(captured: Captured, scheduler: Scheduler) -> None:
    scheduler.add_request(request("a"))
    scheduler.add_request(request("b", sampled=False))
    assert told(captured, frames.Request) == [
        frames.Request(b"kkkkkkka", 1, b"T" * 16, b"P" * 8, "user's a", 12_500_000_000, "user's a")
    ]


def test_where_detail_is_asked_for_each_request_says_so(captured: Captured, scheduler: Scheduler) -> None:
    captured.recorder.settings = replace(captured.recorder.settings, request_spans="detail")
    scheduler.add_request(request("a"))
    [frame] = told(captured, frames.Request)
    assert frame.detail


def test_a_step_tells_whom_it_serves_and_counts_the_others(captured: Captured, scheduler: Scheduler) -> None:
    for made in (request("a"), request("b", sampled=False), request("c")):
        scheduler.add_request(made)
    output = scheduler.schedule({"a": 4, "b": 3, "c": 2})
    scheduler.update_from_output(output, {"a": (1, None), "b": (0, None)})
    (scheduled,) = told(captured, frames.Scheduled)
    assert (scheduled.requests, scheduled.tokens, scheduled.prefills) == ([1, 2], [4, 2], [True, True])
    assert (scheduled.total_tokens, scheduled.total_requests, scheduled.ranks) == (9, 3, 2)
    assert scheduled.opened_ns <= scheduled.scheduled_ns
    assert getattr(output, engine.STEP_ATTRIBUTE) == (
        scheduled.trace_id,
        scheduled.span_id,
        1,
        "prefill",
        True,
        (),
    )
    (updated,) = told(captured, frames.Updated)
    assert (updated.span_id, updated.requests, updated.new_tokens, updated.finished) == (
        scheduled.span_id,
        [1],
        [1],
        [],
    )


def decoding(scheduler: Scheduler, *request_ids: str) -> Any:
    """A step in which each of these requests gets a token; its output has been taken in."""
    output = scheduler.schedule(dict.fromkeys(request_ids, 1))
    scheduler.update_from_output(output, dict.fromkeys(request_ids, (1, None)))
    return output


def test_a_decode_batch_that_has_not_changed_is_not_listed_again(captured: Captured, scheduler: Scheduler) -> None:
    for made in (request("a"), request("b", sampled=False), request("c")):
        scheduler.add_request(made)
    scheduler.schedule({"a": 4, "b": 4, "c": 4})
    for _ in range(3):
        decoding(scheduler, "a", "b", "c")
    decoding(scheduler, "a", "c")
    prefill, first, *same, fewer = told(captured, frames.Scheduled)
    assert [(step.requests, step.like) for step in (prefill, first, fewer)] == [([1, 2], b"")] * 3
    assert [(step.requests, step.tokens, step.prefills, step.like) for step in same] == [
        ([], [], [], first.span_id)
    ] * 2
    assert [(step.kind, step.total_requests, step.total_tokens) for step in same] == [("decode", 3, 3)] * 2
    updates = told(captured, frames.Updated)
    assert [(step.each, step.requests) for step in updates] == [(1, [])] * 4


def test_a_batch_is_listed_again_now_and_then_for_the_list_may_have_been_lost(
    captured: Captured, scheduler: Scheduler
) -> None:
    scheduler.add_request(request("a"))
    scheduler.schedule({"a": 4})
    for _ in range(200):
        decoding(scheduler, "a")
    listed = [index for index, step in enumerate(told(captured, frames.Scheduled)) if not step.like]
    assert max(after - before for before, after in itertools.pairwise(listed)) <= 64


def test_a_request_that_is_another_now_is_listed(captured: Captured, scheduler: Scheduler) -> None:
    """It has ended, and another of its name has come: its tokens look as before."""
    scheduler.add_request(request("a"))
    scheduler.schedule({"a": 4})
    decoding(scheduler, "a")
    scheduler.finished.add("a")
    scheduler.seen.clear()
    scheduler.add_request(request("a"))
    scheduler.schedule({"a": 1})
    assert [step.like for step in told(captured, frames.Scheduled)] == [b""] * 3


@pytest.mark.parametrize(
    "outputs",
    [
        {"a": (1, None)},
        {"a": (1, None), "b": (0, None)},
        {"a": (1, None), "b": (2, None)},
        {"a": (1, None), "b": (1, "stop")},
    ],
)
def test_an_output_that_is_not_a_token_for_each_is_told_one_by_one(
    captured: Captured, scheduler: Scheduler, outputs: dict[str, tuple[int, str | None]]
) -> None:
    scheduler.add_request(request("a"))
    scheduler.add_request(request("b"))
    scheduler.schedule({"a": 4, "b": 4})
    output = scheduler.schedule({"a": 1, "b": 1})
    scheduler.update_from_output(output, outputs)
    [updated] = told(captured, frames.Updated)
    assert updated.each == 0
    assert updated.requests == [1, 2][: len(outputs)]
    assert updated.new_tokens == [count for count, _ in outputs.values()]


def test_the_kind_of_a_step_follows_from_what_its_requests_are_at(captured: Captured, scheduler: Scheduler) -> None:
    scheduler.add_request(request("a"))
    scheduler.schedule({"a": 3})
    scheduler.schedule({"a": 1})
    scheduler.schedule({"a": 1})
    scheduler.add_request(request("b"))
    scheduler.schedule({"a": 1, "b": 4})
    assert [step.kind for step in told(captured, frames.Scheduled)] == ["prefill", "prefill", "decode", "mixed"]
    assert [step.prefills for step in told(captured, frames.Scheduled)] == [[True], [True], [False], [False, True]]


def test_where_another_engine_did_the_prefill_there_is_none(captured: Captured, scheduler: Scheduler) -> None:
    scheduler.add_request(request("a", remote=True))
    scheduler.schedule({"a": 1})
    assert [step.kind for step in told(captured, frames.Scheduled)] == ["decode"]


def test_a_finished_request_is_told_with_its_last_output(captured: Captured, scheduler: Scheduler) -> None:
    scheduler.add_request(request("a"))
    output = scheduler.schedule({"a": 4})
    scheduler.update_from_output(output, {"a": (1, "length")})
    scheduler.schedule({})
    assert [step.finished for step in told(captured, frames.Updated)] == [[1]]
    assert [step.ended for step in told(captured, frames.Scheduled)] == [[]]


def test_where_the_worker_is_in_the_same_process_the_last_step_of_a_request_waits_for_no_other_thread(
    captured: Captured, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(captured.recorder.idle, "resolve", lambda: None)
    scheduler.add_request(request("a"))
    output = scheduler.schedule({"a": 4})
    with otel_npu.step("prefill"), otel_npu.stage("forward"):
        pass
    scheduler.update_from_output(output, {"a": (1, "length")})
    wait_until(lambda: any(isinstance(frame, frames.Step) for frame in captured.sent))
    monkeypatch.undo()


def test_while_others_run_the_end_of_a_request_leaves_with_the_steps_to_come(
    captured: Captured, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(captured.recorder.idle, "resolve", lambda: None)
    monkeypatch.setattr(captured.recorder.channel, "drain", lambda: None)
    for name in "ab":
        scheduler.add_request(request(name))
    output = scheduler.schedule({"a": 4, "b": 4})
    scheduler.update_from_output(output, {"a": (1, "length"), "b": (1, None)})
    assert captured.recorder.channel.deferred
    output = scheduler.schedule({"b": 1})
    scheduler.update_from_output(output, {"b": (1, "length")})
    assert not captured.recorder.channel.deferred
    monkeypatch.undo()


def test_an_aborted_request_is_told_with_the_next_step_even_without_tokens(
    captured: Captured, scheduler: Scheduler
) -> None:
    scheduler.add_request(request("a"))
    scheduler.schedule({"a": 4})
    scheduler.finished.add("a")
    output = scheduler.schedule({})
    carrier = told(captured, frames.Scheduled)[1]
    assert (carrier.ended, carrier.trace_id, carrier.total_tokens) == ([1], b"", 0)
    assert not hasattr(output, engine.STEP_ATTRIBUTE)


def test_a_preempted_request_is_told(captured: Captured, scheduler: Scheduler) -> None:
    scheduler.add_request(request("a"))
    scheduler.add_request(request("b"))
    scheduler.schedule({"a": 4, "b": 4})
    scheduler.schedule({"a": 1}, ("b",))
    assert [step.preempted for step in told(captured, frames.Scheduled)] == [[], [2]]


def test_step_traces_are_kept_at_the_rate_that_was_chosen_and_the_others_have_their_ids_all_the_same() -> None:
    with capturing(steps_per_second=1) as captured:
        scheduler = Scheduler()
        engine.EngineSteps(scheduler, CONFIG)
        scheduler.add_request(request("a"))
        for _ in range(5):
            scheduler.schedule({"a": 4})
        kept = [step.kept for step in told(captured, frames.Scheduled)]
        assert kept[0]
        assert not all(kept)
        assert all(step.trace_id and step.span_id for step in told(captured, frames.Scheduled))


def test_without_root_traces_no_step_is_a_trace() -> None:
    with capturing(root_traces=False) as captured:
        scheduler = Scheduler()
        engine.EngineSteps(scheduler, CONFIG)
        scheduler.add_request(request("a"))
        scheduler.schedule({"a": 4})
        assert [step.trace_id for step in told(captured, frames.Scheduled)] == [b""]


@pytest.mark.slow
def test_nothing_is_left_of_10000_requests(captured: Captured) -> None:
    scheduler = Scheduler()
    steps = engine.EngineSteps(scheduler, CONFIG)
    for number in range(10_000):
        request_id = f"r{number}"
        scheduler.add_request(request(request_id, sampled=number % 3 > 0))
        output = scheduler.schedule({request_id: 4})
        if number % 2:
            scheduler.update_from_output(output, {request_id: (1, "stop")})
        else:
            scheduler.finished.add(request_id)  # aborted
        del scheduler.requests[request_id]
    scheduler.schedule({})
    assert not steps._members


def test_two_engines_of_one_process_number_their_requests_together(captured: Captured) -> None:
    for name in ("a", "b"):
        scheduler = Scheduler()
        engine.EngineSteps(scheduler, CONFIG)
        scheduler.add_request(request(name))
    assert [frame.number for frame in told(captured, frames.Request)] == [1, 2]


def test_a_session_with_its_inputs_in_a_stream_is_no_request(captured: Captured, scheduler: Scheduler) -> None:
    scheduler.add_request(request("a", sampled=False))
    output = scheduler.schedule({"a": 4})
    scheduler.update_from_output(output, {"a": (1, "stop")})
    scheduler.add_request(request("a", sampled=False))
    scheduler.schedule({"a": 4})
    assert not told(captured, frames.Request)
    assert told(captured, frames.Scheduled)[0].kind == "prefill"


def test_a_scheduler_that_answers_strangely_is_not_disturbed(captured: Captured) -> None:
    class Strange:
        def add_request(self, request: Any) -> str:
            return "added"

        def schedule(self) -> str:
            return "scheduled"

        def update_from_output(self, output: Any) -> str:
            return "updated"

    scheduler = Strange()
    engine.EngineSteps(scheduler, CONFIG)
    assert scheduler.add_request(object()) == "added"
    assert scheduler.schedule() == "scheduled"
    assert scheduler.update_from_output(None) == "updated"
    assert captured.recorder.drops.take_unsent() == {"internal_error": 2}


class Broken:
    """Whatever is asked of it, it raises."""

    def __init__(self, error: type[BaseException]) -> None:
        self.error = error

    def __next__(self) -> int:
        raise self.error

    def __getattr__(self, _: str) -> Any:
        raise self.error

    def __len__(self) -> int:
        raise self.error


@pytest.mark.parametrize("part", ["limiter", "step_numbers", "slow", "channel"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_while_a_step_is_told_is_vllms_only_if_it_is_the_programs(
    captured: Captured, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch, part: str, error: type[BaseException]
) -> None:
    scheduler = Scheduler()
    followed = engine.EngineSteps(scheduler, CONFIG)
    scheduler.add_request(request("a"))
    for _ in range(3):
        scheduler.update_from_output(scheduler.schedule({"a": 1}), {"a": (1, None)})
    if part == "channel":
        monkeypatch.setattr(followed.channel, "deferred", Broken(error))
    else:
        monkeypatch.setattr(followed, part, Broken(error))

    def run() -> Any:
        output = scheduler.schedule({"a": 1})
        return scheduler.update_from_output(output, {"a": (1, None)})

    if error is KeyboardInterrupt:
        with pytest.raises(KeyboardInterrupt):
            run()
    else:
        assert [output.request_id for output in run()[0].outputs] == ["a"]
    monkeypatch.undo()
    assert bool(captured.recorder.drops.take_unsent()) is (error is ValueError)
    scheduler.update_from_output(scheduler.schedule({"a": 1}), {"a": (1, None)})
    assert told(captured, frames.Scheduled)[-1].kind == "decode"


def test_what_was_left_out_is_told_with_the_next_step_though_that_repeats_the_one_before(
    captured: Captured, scheduler: Scheduler
) -> None:
    """Of an engine whose workers are other processes nothing else tells it."""
    scheduler.add_request(request("a"))
    for number in range(8):
        if number == 5:
            captured.recorder.drops.add("too_many_slow", 3)
        scheduler.update_from_output(scheduler.schedule({"a": 4 if number == 0 else 1}), {"a": (1, None)})
    steps = told(captured, frames.Scheduled)
    assert [step.dropped for step in steps] == [{}] * 5 + [{"too_many_slow": 3}] + [{}] * 2
    assert [step.like == steps[1].span_id for step in steps] == [False] * 2 + [True] * 6


def test_a_scheduler_without_one_of_the_methods_is_one_warning(
    captured: Captured, caplog: pytest.LogCaptureFixture
) -> None:
    class Other:
        def add_request(self, request: Any) -> None: ...

        def schedule(self) -> None: ...

    engine.EngineSteps(Other(), CONFIG)
    (record,) = caplog.records
    assert "update_from_output" in record.getMessage()


class Run:
    """A scheduler that runs one step after the other, on a clock of the test's own."""

    def __init__(self, captured: Captured, scheduler: Scheduler) -> None:
        self.captured, self.scheduler = captured, scheduler
        self.ns = 0
        scheduler.add_request(request("a"))

    def schedule(self, tokens: int = 1) -> Any:
        return self.scheduler.schedule({"a": tokens})

    def update(self, output: Any, after_ms: int) -> None:
        self.ns += after_ms * 1_000_000
        self.scheduler.update_from_output(output, {"a": (1, None)})

    def steps(self, count: int, ms: int = 10, tokens: int = 1) -> None:
        for _ in range(count):
            self.update(self.schedule(tokens), ms)

    def reasons(self) -> list[str]:
        return [updated.keep for updated in told(self.captured, frames.Updated)]


@contextlib.contextmanager
def running(captured: Captured, scheduler: Scheduler) -> Iterator[Run]:
    """The scheduler, followed by the run's own clock."""

    followed = engine.EngineSteps(scheduler, CONFIG)
    one = Run(captured, scheduler)

    def now() -> int:
        return one.ns

    followed.limiter = Limiter(captured.recorder.settings.steps_per_second, now)
    with stage_clock(now), mock.patch.object(engine, "perf_counter_ns", now):
        yield one


@pytest.fixture
def run() -> Iterator[Run]:
    with capturing(steps_per_second=0) as captured, running(captured, Scheduler()) as run:
        yield run


def test_a_slow_step_is_told_with_its_output_and_the_workers_with_a_step_soon_after(run: Run) -> None:
    run.steps(20)
    slow = run.schedule()
    run.update(slow, 31)
    assert run.reasons()[-1] == "slow"  # by now what was deferred has been sent
    after = run.schedule()
    run.update(after, 10)
    last = run.schedule()
    assert run.reasons() == [""] * 20 + ["slow", ""]
    slow_id = getattr(slow, engine.STEP_ATTRIBUTE)[1]
    assert getattr(after, engine.STEP_ATTRIBUTE)[5] == (slow_id,)
    assert getattr(last, engine.STEP_ATTRIBUTE)[5] == ()


def test_the_step_behind_a_slow_one_is_not_to_blame(run: Run) -> None:
    run.steps(20)
    slow = run.schedule()
    behind = run.schedule()
    run.update(slow, 40)
    run.update(behind, 10)
    assert run.reasons() == [""] * 20 + ["slow", ""]


def test_a_pause_between_steps_is_not_the_next_ones(run: Run) -> None:
    run.steps(20)
    run.ns += 10**12
    run.steps(1)
    assert run.reasons() == [""] * 21


def test_steps_are_compared_with_those_of_their_size(run: Run) -> None:
    run.steps(20, ms=10, tokens=1)
    run.steps(20, ms=100, tokens=512)
    run.steps(1, ms=100, tokens=1)
    run.steps(1, ms=10, tokens=1)
    assert run.reasons() == [""] * 40 + ["slow", ""]


def test_with_slow_steps_off_none_is_kept() -> None:
    with capturing(steps_per_second=0, slow_step=float("inf")) as captured, running(captured, Scheduler()) as run:
        run.steps(20)
        run.steps(1, ms=1000)
        assert run.reasons() == [""] * 21


def test_a_step_that_was_chosen_is_not_kept_twice(captured: Captured) -> None:
    with running(captured, Scheduler()) as run:  # every step is chosen
        run.steps(20)
        run.steps(1, ms=1000)
        assert run.reasons() == [""] * 21


def test_steps_without_an_output_are_forgotten(captured: Captured) -> None:
    scheduler = Scheduler()
    steps = engine.EngineSteps(scheduler, CONFIG)
    scheduler.add_request(request("a"))
    for _ in range(1000):
        scheduler.schedule({"a": 1})
    assert len(steps.running) == 64


# What a request got for nothing


def test_what_the_caches_had_of_a_prompt_is_told_once_with_the_step_that_first_serves_it(
    captured: Captured, scheduler: Scheduler
) -> None:
    for made, here, elsewhere in ((request("a"), 32, 16), (request("b", sampled=False), 8, 0)):
        stats = {"num_local_cached_tokens": here, "num_external_cached_tokens": elsewhere}
        made.prefill_stats = types.SimpleNamespace(**stats)
        scheduler.add_request(made)
    scheduler.schedule({"a": 4, "b": 4})
    scheduler.seen.clear()  # model runner V2 sees a resumed request as a new one
    scheduler.schedule({"a": 1, "b": 1})
    first, second = told(captured, frames.Scheduled)
    assert (first.first, first.cached, first.fetched) == ([1], [32], [16])
    assert (first.total_cached, first.total_fetched) == (40, 16)
    assert (second.first, second.total_cached, second.total_fetched) == ([], 0, 0)


def test_versions_that_count_on_the_request_itself_are_understood() -> None:
    assert cached_tokens(types.SimpleNamespace(num_cached_tokens=48, num_external_computed_tokens=16)) == (32, 16)
    assert cached_tokens(types.SimpleNamespace(num_cached_tokens=-1)) == (0, 0)


def test_drafts_are_counted_as_vllm_counts_them(captured: Captured, scheduler: Scheduler) -> None:
    for name in ("a", "b", "c"):
        scheduler.add_request(request(name, sampled=name != "b"))
    scheduler.drafts = {"a": [7, 8, 9], "b": [7, 8]}
    output = scheduler.schedule({"a": 4, "b": 3, "c": 1})
    output.num_invalid_spec_tokens = {"a": 1}
    outputs = Outputs({"a": (1, "length"), "b": (1, None), "c": (1, None)})
    outputs.sampled_token_ids = [[1, 2, 3], [4], [5]]  # of which vLLM passes on what is before the request's end
    outputs.req_id_to_index = {"a": 0, "b": 1, "c": 2}
    scheduler.update_from_output(output, outputs)
    (updated,) = told(captured, frames.Updated)
    assert (updated.requests, updated.drafted, updated.accepted) == ([1, 2], [2, 0], [2, 0])
    assert (updated.total_drafted, updated.total_accepted) == (4, 2)


class Outputs(dict[str, tuple[int, str | None]]):
    """What a model runner gave."""

    sampled_token_ids: list[list[int]]
    req_id_to_index: dict[str, int]


# KV cache from elsewhere


class Connector:
    """A KV connector's half in the scheduler."""

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        pass

    def update_connector_output(self, connector_output: Any) -> None:
        pass

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, None]:
        return bool(block_ids), None


class Fetching(Scheduler):
    """A scheduler with a connector, whose requests wait where a test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.connector = Connector()
        self.failed_recving_kv_req_ids: set[str] = set()

    def _handle_invalid_blocks(self, failed: set[str]) -> set[str]:
        return failed


@pytest.fixture
def fetching(captured: Captured) -> Iterator[Any]:
    scheduler: Any = Fetching()
    engine.EngineSteps(scheduler, CONFIG)
    for made in (request("a"), request("b"), request("c", sampled=False)):
        made.status = types.SimpleNamespace(name="RUNNING")
        scheduler.add_request(made)
    return scheduler  # type: ignore[no-any-return]


def done(received: set[str] = frozenset(), sent: set[str] | None = None) -> Any:  # type: ignore[assignment]
    return types.SimpleNamespace(finished_recving=received or None, finished_sending=sent)


def test_a_request_that_waits_for_kv_cache_is_told_when_it_begins_and_when_it_ends(
    captured: Captured, fetching: Any
) -> None:
    waiting = fetching.requests["a"]
    for name in ("a", "b", "c"):  # that of b is loaded inside its step
        fetching.connector.update_state_after_alloc(fetching.requests[name], None, 32)
    waiting.status = types.SimpleNamespace(name="WAITING_FOR_REMOTE_KVS")
    fetching.schedule({})
    fetching.connector.update_state_after_alloc(waiting, None, 0)
    fetching.connector.update_connector_output(done())
    fetching.connector.update_connector_output(done({"a", "c"}))
    begun, ended = told(captured, frames.Transfers)
    assert (begun.connector, begun.loading, begun.tokens) == ("Connector", [1], [32])
    assert (ended.loading, ended.loaded, ended.failed) == ([], [1], [])
    assert begun.at_ns <= ended.at_ns


def test_loads_that_failed_are_told(captured: Captured, fetching: Any) -> None:
    fetching.failed_recving_kv_req_ids.add("a")
    fetching.connector.update_connector_output(done({"a"}))
    assert fetching._handle_invalid_blocks({"b", "c"}) == {"b", "c"}
    waited, in_step = told(captured, frames.Transfers)
    assert (waited.loaded, waited.failed) == ([1], [1])
    assert (in_step.loaded, in_step.failed) == ([], [2])


def test_blocks_that_are_kept_for_somebody_else_are_told_until_they_are_free(captured: Captured, fetching: Any) -> None:
    assert fetching.connector.request_finished(fetching.requests["a"], [1]) == (True, None)
    fetching.connector.request_finished(fetching.requests["b"], [])
    fetching.finished = {"a", "b", "c"}
    fetching.schedule({})
    fetching.connector.update_connector_output(done(sent={"a", "c"}))
    kept, free = told(captured, frames.Transfers)
    assert (kept.sending, free.sent) == ([1], [1])


def test_a_request_that_came_while_capture_was_off_still_makes_its_steps_what_they_are(
    captured: Captured, scheduler: Scheduler
) -> None:
    recorder = captured.recorder
    recorder.obey(on=False)
    scheduler.add_request(request("a", 10))
    scheduler.schedule({"a": 4})
    recorder.obey(on=True)
    scheduler.schedule({"a": 6})
    scheduler.schedule({"a": 1})
    captured.finish()
    told = [frame for frame in captured.sent if isinstance(frame, frames.Scheduled)]
    assert [(frame.kind, frame.total_tokens, frame.requests) for frame in told] == [
        ("prefill", 6, []),
        ("decode", 1, []),
    ]
