"""A worker's steps and stages, on a worker and scopes of the same shape as vLLM's."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import sys
import threading
import types
from typing import TYPE_CHECKING, Any

import pytest

from otel_npu import semconv
from otel_npu.capture import switch
from otel_npu.vllm import worker as hooks
from otel_npu.vllm.engine import STEP_ATTRIBUTE
from otel_npu.wire import frames
from tests.helpers.capturing import capturing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.helpers.capturing import Captured

TRACE, ENGINE_STEP = b"T" * 16, b"E" * 8


@pytest.fixture(params=[False, True], ids=["first", "later"], autouse=True)
def later(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of this is true of a worker's first step, and of those after it."""
    monkeypatch.setattr(Worker, "later", request.param)
    monkeypatch.setattr(hooks, "_connectors", False)


def config(**parallel: int) -> Any:
    fields = {"tensor_parallel_size": 1, "world_size": 1, "data_parallel_rank": 0, **parallel}
    return types.SimpleNamespace(parallel_config=types.SimpleNamespace(**fields))


class Worker:
    """Runs its stages in `execute_model` and `sample_tokens`, as model runner V1 does."""

    later = False
    """Whether a first step has been there, after which the extension module does what is usual."""

    def __init__(self, *, rank: int = 0, pooling: bool = False, **parallel: int) -> None:
        self.rank = rank
        self.vllm_config = config(**parallel)
        self.model_runner = types.SimpleNamespace(is_pooling_model=pooling)
        self.executing: Callable[[], object] = lambda: stage("gpu_model_runner: forward")
        self.sampling: Callable[[], object] = lambda: stage("gpu_model_runner: sample")
        if self.later:
            steps = hooks._of(self)
            steps._recorder()
            steps.usual = steps.samples and not hooks._connectors

    def execute_model(self, scheduler_output: Any) -> object:
        self.executing()
        return scheduler_output.result

    def sample_tokens(self, grammar_output: Any) -> object:
        self.sampling()
        return grammar_output

    def execute_dummy_batch(self) -> None:
        stage("gpu_model_runner: forward")

    def compile_or_warm_up_model(self) -> None:
        self.execute_model(output(told=False))

    execute_model = hooks.around_execute_model(execute_model)
    sample_tokens = hooks.around_sample_tokens(sample_tokens)
    execute_dummy_batch = hooks.around_dummy_batch(execute_dummy_batch)
    compile_or_warm_up_model = hooks.around_warm_up(compile_or_warm_up_model)


def stage(name: str) -> None:
    with hooks.scope(name):
        pass


def output(*, tokens: int = 1, result: object = None, told: bool = True, trace_id: bytes = TRACE) -> Any:
    """A scheduler's output, with the context of its step."""
    made = types.SimpleNamespace(total_num_scheduled_tokens=tokens, num_scheduled_tokens={"a": tokens}, result=result)
    if told:
        setattr(made, STEP_ATTRIBUTE, (trace_id, ENGINE_STEP, 7, "decode", True, ()))
    return made


def names(step: frames.Step) -> list[str]:
    return [stage.name for stage in step.stages]


def test_a_step_reaches_across_both_calls(captured: Captured) -> None:
    worker = Worker()
    worker.execute_model(output())
    worker.sample_tokens(None)
    step = captured.step()
    assert names(step) == ["forward", "sample"]
    assert (step.trace_id, step.parent_span_id, step.number, step.kind) == (TRACE, ENGINE_STEP, 7, "decode")
    assert all(stage.device_ns is not None for stage in step.stages)


def test_the_raw_name_of_a_scope_is_kept(captured: Captured) -> None:
    worker = Worker()
    worker.execute_model(output(result="output"))
    (forward,) = captured.step().stages
    assert forward.attributes == {semconv.RAW_NAME: "gpu_model_runner: forward"}


def test_the_log_line_has_the_engines_own_names(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "otel_npu"), capturing(log_stages=True) as captured:
        worker = Worker()
        worker.executing = lambda: stage("prepare input")
        worker.sampling = lambda: stage("post process")
        worker.execute_model(output())
        worker.sample_tokens(None)
        captured.finish()
    (record,) = [record for record in caplog.records if record.levelno == logging.INFO]
    assert record.getMessage() == "Profile execute duration [Decode]: [post process]:0.00ms [prepare input]:0.00ms"


def test_a_step_that_is_no_trace_is_still_told_with_its_engines_step(captured: Captured) -> None:
    worker = Worker()
    worker.execute_model(output(trace_id=b"", result="output"))
    step = captured.step()
    assert (step.trace_id, step.parent_span_id) == (b"", ENGINE_STEP)
    assert names(step) == ["forward"]


def test_a_step_without_tokens_runs_no_model_and_is_nothing(captured: Captured) -> None:
    worker = Worker()
    worker.execute_model(output(tokens=0, result="output"))
    assert not captured.steps()


@pytest.mark.parametrize(("pooling", "result"), [(True, None), (False, "output")])
def test_a_step_whose_output_is_returned_at_once_ends_there(
    captured: Captured, result: object, *, pooling: bool
) -> None:
    worker = Worker(pooling=pooling)
    worker.execute_model(output(result=result))
    assert names(captured.step()) == ["forward"]


def test_a_version_without_sampling_of_its_own_ends_the_step_at_once(captured: Captured) -> None:
    class Old:
        rank = 0
        vllm_config = config()
        model_runner = types.SimpleNamespace()
        execute_model = hooks.around_execute_model(lambda _self, _output: stage("forward"))

    Old().execute_model(output())
    assert names(captured.step()) == ["forward"]


def test_a_step_that_was_never_sampled_ends_with_the_next(captured: Captured) -> None:
    worker = Worker()
    worker.execute_model(output())
    worker.execute_model(output(result="output"))
    assert [names(step) for step in captured.steps()] == [["forward"], ["forward"]]


@pytest.mark.parametrize("call", ["executing", "sampling"])
def test_the_models_error_ends_the_step_and_goes_on(captured: Captured, call: str) -> None:
    def fail() -> None:
        raise RuntimeError("the model's own")

    worker = Worker()
    setattr(worker, call, fail)

    def run() -> None:
        worker.execute_model(output())
        worker.sample_tokens(None)

    with pytest.raises(RuntimeError, match="the model's own"):
        run()
    assert captured.step().error == "RuntimeError"


def test_an_idle_ranks_dummy_batch_is_one_forward(captured: Captured) -> None:
    Worker().execute_dummy_batch()
    step = captured.step()
    assert (step.kind, names(step)) == ("dummy", ["forward"])


def test_warm_up_is_nothing(captured: Captured) -> None:
    Worker().compile_or_warm_up_model()
    assert not captured.steps()


def test_scopes_outside_of_a_step_touch_no_event(captured: Captured) -> None:
    stage("gpu_model_runner: forward")
    assert not captured.device.pools
    assert not captured.steps()


def test_scopes_on_other_threads_touch_no_event(captured: Captured) -> None:
    worker = Worker()

    def elsewhere() -> None:
        thread = threading.Thread(target=stage, args=("gpu_model_runner: forward",))
        thread.start()
        thread.join()

    worker.executing = elsewhere
    worker.execute_model(output(result="output"))
    assert not captured.device.pools
    assert names(captured.step()) == []


def test_a_scope_without_device_work_is_timed_by_the_host(captured: Captured) -> None:
    worker = Worker()
    worker.executing = lambda: stage("gpu_model_runner: bookkeep")
    worker.execute_model(output(result="output"))
    (bookkeep,) = captured.step().stages
    assert (bookkeep.name, bookkeep.device_ns) == ("bookkeep", None)
    assert not captured.device.pools


@pytest.mark.parametrize("name", ["schedule: allocate_slots", "llm_engine step: get_output"])
def test_a_scope_of_the_scheduler_or_the_front_end_is_no_stage(captured: Captured, name: str) -> None:
    worker = Worker()
    worker.executing = lambda: stage(name)
    worker.execute_model(output(result="output"))
    assert names(captured.step()) == []


def test_ranks_are_told_and_which_of_them_returns_the_output(captured: Captured) -> None:
    for rank in range(4):
        worker = Worker(rank=rank, tensor_parallel_size=2, world_size=4, data_parallel_rank=3)
        worker.execute_model(output(result="output"))
    steps = captured.steps()
    assert [(step.rank, step.returns_output) for step in steps] == [(0, False), (1, False), (2, True), (3, False)]
    assert [captured.said(step) for step in steps] == [
        {semconv.TP_RANK: tp, semconv.PP_RANK: pp, semconv.DP_RANK: 3, semconv.STEP_RANKS: 4}
        for pp in (0, 1)
        for tp in (0, 1)
    ]


def test_a_dense_model_has_a_data_parallel_rank_too(captured: Captured) -> None:
    """Of a dense model vLLM sets `data_parallel_rank` to 0 on every rank; only the index is left."""
    Worker(data_parallel_rank=0, data_parallel_index=1).execute_model(output(result="output"))
    assert captured.said(captured.step()) == {
        semconv.TP_RANK: 0,
        semconv.PP_RANK: 0,
        semconv.DP_RANK: 1,
        semconv.STEP_RANKS: 1,
    }


def test_under_an_external_launcher_a_rank_is_told_within_its_replica(captured: Captured) -> None:
    """There vLLM's `world_size` and ranks go over all replicas."""
    for rank in (2, 3):
        worker = Worker(rank=rank, tensor_parallel_size=2, pipeline_parallel_size=1, world_size=4, data_parallel_rank=1)
        worker.execute_model(output(result="output"))
    steps = captured.steps()
    assert [(step.rank, step.returns_output) for step in steps] == [(2, True), (3, False)]
    assert [captured.said(step) for step in steps] == [
        {semconv.TP_RANK: tp, semconv.PP_RANK: 0, semconv.DP_RANK: 1, semconv.STEP_RANKS: 2} for tp in (0, 1)
    ]


def test_the_graph_mode_of_the_forward_is_told(captured: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    mode = types.SimpleNamespace(cudagraph_runtime_mode=types.SimpleNamespace(name="FULL"))
    monkeypatch.setitem(sys.modules, "vllm.forward_context", types.SimpleNamespace(_forward_context=mode))
    Worker().execute_model(output(result="output"))
    step = captured.step()
    assert step.attributes is not None
    assert step.attributes[semconv.GRAPH_MODE] == "full"


def test_each_step_is_told_in_its_own_graph_mode_however_many_there_are(
    captured: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes = [types.SimpleNamespace(name=f"MODE_{number}") for number in range(12)]
    forward_context = types.SimpleNamespace(_forward_context=None)
    monkeypatch.setitem(sys.modules, "vllm.forward_context", forward_context)
    worker = Worker()
    order = [0, 1, 0, 0, *range(12), *range(12)]
    for number in order:
        forward_context._forward_context = types.SimpleNamespace(cudagraph_runtime_mode=modes[number])
        worker.execute_model(output(result="output"))
    told = [step.attributes[semconv.GRAPH_MODE] for step in captured.steps() if step.attributes]
    assert told == [f"mode_{number}" for number in order]


@pytest.mark.parametrize(
    "forward_context",
    [
        types.SimpleNamespace(_forward_context=None),
        types.SimpleNamespace(_forward_context=types.SimpleNamespace()),
        types.SimpleNamespace(_forward_context=types.SimpleNamespace(cudagraph_runtime_mode=None)),
        types.SimpleNamespace(),
    ],
)
def test_where_no_graph_mode_is_known_none_is_told(
    captured: Captured, monkeypatch: pytest.MonkeyPatch, forward_context: Any
) -> None:
    monkeypatch.setitem(sys.modules, "vllm.forward_context", forward_context)
    Worker().execute_model(output(result="output"))
    step = captured.step()
    assert semconv.GRAPH_MODE not in (step.attributes or {})
    assert [stage.name for stage in step.stages] == ["forward"]


def test_what_is_raised_while_the_graph_mode_is_asked_for_goes_on(
    captured: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal handler of the program's may raise there as anywhere."""

    raised = [KeyboardInterrupt]

    class Context:
        @property
        def cudagraph_runtime_mode(self) -> None:
            if raised:
                raise raised.pop()

    forward_context = types.SimpleNamespace(_forward_context=Context())
    monkeypatch.setitem(sys.modules, "vllm.forward_context", forward_context)
    with pytest.raises(KeyboardInterrupt):
        Worker().execute_model(output(result="output"))
    assert captured.step().error == "KeyboardInterrupt"


def test_the_graph_mode_is_told_where_the_forward_context_begins_inside_the_forward(
    captured: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextlib.contextmanager
    def set_ascend_forward_context() -> Any:
        mode = types.SimpleNamespace(cudagraph_runtime_mode=types.SimpleNamespace(name="PIECEWISE"))
        with monkeypatch.context() as patched:
            patched.setitem(sys.modules, "vllm.forward_context", types.SimpleNamespace(_forward_context=mode))
            yield

    def run() -> None:
        with hooks.scope("forward"), hooks.noting_graph_mode(set_ascend_forward_context)():
            pass

    worker = Worker()
    worker.executing = run
    worker.execute_model(output(result="output"))
    step = captured.step()
    assert step.attributes is not None
    assert step.attributes[semconv.GRAPH_MODE] == "piecewise"


def test_without_the_engines_word_a_step_is_a_trace_of_its_own(captured: Captured) -> None:
    Worker().execute_model(output(told=False, result="output"))
    step = captured.step()
    assert step.trace_id
    assert not step.parent_span_id


def test_a_worker_whose_configuration_is_strange_runs_on(captured: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Worker, "later", False)
    worker = Worker()
    del worker.vllm_config.parallel_config
    assert worker.execute_model(output(result="output")) == "output"
    assert captured.dropped() == {semconv.INTERNAL_ERROR: 2}  # at the step's begin and at its end


def test_nothing_is_captured_once_tracing_is_off(captured: Captured) -> None:
    worker = Worker()
    worker.execute_model(output())
    switch.turn_off(captured.recorder)
    worker.sample_tokens(None)
    worker.execute_model(output(result="output"))
    assert switch.current_recorder() is None


@pytest.mark.parametrize(
    "call", [lambda worker, given: worker.execute_model(scheduler_output=given), Worker.execute_model]
)
def test_a_step_may_be_asked_for_in_any_way(captured: Captured, call: Any) -> None:
    assert call(Worker(), output(result="output")) == "output"
    assert captured.step().number == 7


def test_what_stands_in_vllms_place_says_what_it_stands_for() -> None:
    def execute_model(self: Any, scheduler_output: Any) -> Any:
        """Run it."""

    for hook in (hooks.around_execute_model, hooks.around_sample_tokens):
        replacement = functools.update_wrapper(hook(execute_model), execute_model)
        assert (replacement.__name__, replacement.__doc__) == ("execute_model", "Run it.")
        assert inspect.signature(replacement) == inspect.signature(execute_model)
        assert "scheduler_output" in str(inspect.signature(types.MethodType(replacement, Worker())))


def test_a_step_that_another_one_turned_out_slow_before_tells_its_own_relay(captured: Captured) -> None:
    given = output(result="output")
    trace_id, span_id, number, kind, kept, _ = getattr(given, STEP_ATTRIBUTE)
    setattr(given, STEP_ATTRIBUTE, (trace_id, span_id, number, kind, kept, (b"slow....",)))
    Worker().execute_model(given)
    assert captured.step().parent_span_id == ENGINE_STEP
    assert [frame.span_ids for frame in captured.sent if isinstance(frame, frames.Keep)] == [[b"slow...."]]


@pytest.mark.parametrize("told", [None, (), (TRACE, ENGINE_STEP, 7, "decode", True), (TRACE, 1, "7", 2, 3, 4)])
def test_what_an_engine_says_in_another_way_is_not_vllms_fault(captured: Captured, told: object) -> None:
    worker = Worker()
    given = output(result="output")
    setattr(given, STEP_ATTRIBUTE, told)
    assert worker.execute_model(given) == "output"
    worker.execute_model(output(result="output"))
    assert captured.steps()[-1].number == 7


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_at_a_steps_end_is_vllms_only_if_it_is_the_programs(
    captured: Captured, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    def fail(*_: object) -> None:
        raise error

    worker = Worker()
    worker.execute_model(output())
    monkeypatch.setattr(captured.recorder, "batch", 1)
    monkeypatch.setattr(captured.recorder, "step_closed", fail)
    if error is KeyboardInterrupt:
        with pytest.raises(KeyboardInterrupt):
            worker.sample_tokens("output")
    else:
        assert worker.sample_tokens("output") == "output"
    monkeypatch.undo()
    worker.execute_model(output(result="output"))
    assert len(captured.steps()) == 2
    assert captured.dropped() == ({} if error is KeyboardInterrupt else {semconv.INTERNAL_ERROR: 1})


class RayWorkerWrapper:
    """Goes past the worker, as Ray's compiled graph does."""

    def __init__(self) -> None:
        self.worker = Worker()

    def execute_model_ray(self, execute_model_input: Any) -> Any:
        self.worker.executing()
        self.worker.sampling()
        return execute_model_input[0].result

    execute_model_ray = hooks.around_ray(execute_model_ray)


def test_a_step_in_rays_compiled_graph_is_one_call(captured: Captured) -> None:
    assert RayWorkerWrapper().execute_model_ray((output(result="output"), "grammar")) == "output"
    assert names(captured.step()) == ["forward", "sample"]


def test_the_models_error_goes_through_rays_compiled_graph(captured: Captured) -> None:
    def fail() -> None:
        raise RuntimeError("the model's own")

    wrapper = RayWorkerWrapper()
    wrapper.worker.executing = fail
    with pytest.raises(RuntimeError, match="the model's own"):
        wrapper.execute_model_ray((output(), "grammar"))
    assert captured.step().error == "RuntimeError"


# The slot.


def module(choice: Callable[[str], Any] | None) -> types.ModuleType:
    """A module like `vllm.v1.utils`: it chooses what it calls when it is first called."""
    made = types.ModuleType("utils")
    made.__dict__.update(_PROFILER_FUNC=None, choice=choice)
    exec(
        "def record_function_or_nullcontext(name):\n"
        "    global _PROFILER_FUNC\n"
        "    if _PROFILER_FUNC is None:\n"
        "        _PROFILER_FUNC = choice\n"
        "    return _PROFILER_FUNC(name)\n",
        made.__dict__,
    )
    return made


@contextlib.contextmanager
def noting(notes: list[str], name: str) -> Any:
    notes.append(name)
    yield


def test_what_vllm_would_have_called_is_called_too(captured: Captured) -> None:
    notes: list[str] = []
    utils = module(lambda name: noting(notes, name))
    hooks.take_slot(utils.record_function_or_nullcontext)
    worker = Worker()

    def run() -> None:
        for name in ("gpu_model_runner: forward", "schedule: allocate_slots"):
            with utils.record_function_or_nullcontext(name):
                pass

    worker.executing = run
    worker.execute_model(output(result="output"))
    assert notes == ["gpu_model_runner: forward", "schedule: allocate_slots"]
    assert names(captured.step()) == ["forward"]


def test_with_nothing_to_call_beside_it_the_slot_holds_our_scope_alone() -> None:
    utils = module(contextlib.nullcontext)
    hooks.take_slot(utils.record_function_or_nullcontext)
    with utils.record_function_or_nullcontext("anything"):
        pass
    assert utils._PROFILER_FUNC is hooks.scope


def test_what_is_in_the_slot_already_is_kept(captured: Captured) -> None:
    notes: list[str] = []
    utils = module(None)
    utils.__dict__["_PROFILER_FUNC"] = lambda name: noting(notes, name)
    hooks.take_slot(utils.record_function_or_nullcontext)
    with utils.record_function_or_nullcontext("forward"):
        pass
    assert notes == ["forward"]


def wrapped(notes: list[str], inner: Callable[[str], Any]) -> Callable[[str], Any]:
    """What another tool makes of a function of scopes: it notes each, and calls what was there."""

    @contextlib.contextmanager
    def other(name: str) -> Iterator[None]:
        notes.append(name)
        with inner(name):
            yield

    return other


@pytest.mark.parametrize("ours_first", [False, True])
@pytest.mark.parametrize("attribute", ["record_function_or_nullcontext", "_PROFILER_FUNC"])
def test_another_tool_that_wraps_the_scopes_before_or_after_us_gets_each_once_and_so_do_we(
    captured: Captured, attribute: str, *, ours_first: bool
) -> None:
    notes: list[str] = []
    utils = module(contextlib.nullcontext)
    space = utils.__dict__

    def wrap() -> None:
        space[attribute] = wrapped(notes, space[attribute] or contextlib.nullcontext)

    def ours() -> None:
        space["record_function_or_nullcontext"] = hooks.take_slot(space["record_function_or_nullcontext"])

    for put_in in (ours, wrap) if ours_first else (wrap, ours):
        put_in()
    worker = Worker()

    def run() -> None:
        with utils.record_function_or_nullcontext("gpu_model_runner: forward"):
            pass

    worker.executing = run
    worker.execute_model(output(result="output"))
    assert notes == ["gpu_model_runner: forward"]
    assert names(captured.step()) == ["forward"]


# Model runner V2 and vllm-ascend's ProfileExecuteDuration.


def test_a_method_without_a_scope_is_a_stage_of_its_own(captured: Captured) -> None:
    sample = hooks.staged("sample")(lambda value: value + 1)
    worker = Worker()
    results: list[int] = []
    worker.executing = lambda: results.append(sample(1))
    worker.execute_model(output(result="output"))
    assert results == [2]
    assert names(captured.step()) == ["sample"]


def test_a_method_and_the_one_that_it_overrides_are_one_stage(captured: Captured) -> None:
    class Base:
        prepare_inputs = hooks.staged("prepare_inputs")(lambda _self: None)

    class Derived(Base):
        prepare_inputs = hooks.staged("prepare_inputs")(Base.prepare_inputs)

    worker = Worker()
    worker.executing = lambda: (Derived().prepare_inputs(), Derived().prepare_inputs())
    worker.execute_model(output(result="output"))
    assert names(captured.step()) == ["prepare_input", "prepare_input"]


def test_the_forward_of_model_runner_v2_is_what_runs_in_its_forward_context(captured: Captured) -> None:
    @contextlib.contextmanager
    def set_forward_context(attn_metadata: object) -> Any:
        yield attn_metadata

    worker = Worker()

    def run() -> None:
        with hooks.forward_inside(set_forward_context)("metadata") as entered:
            assert entered == "metadata"

    worker.executing = run
    worker.execute_model(output(result="output"))
    assert names(captured.step()) == ["forward"]


def test_a_worker_passes_on_which_steps_were_slow(captured: Captured) -> None:
    made = output(result="output")
    setattr(made, STEP_ATTRIBUTE, (TRACE, ENGINE_STEP, 7, "decode", False, (b"12345678",)))
    Worker().execute_model(made)
    step = captured.step()
    assert (step.trace_id, step.kept) == (TRACE, False)
    assert len(step.span_id) == 8
    assert [frame for frame in captured.sent if isinstance(frame, frames.Keep)] == [frames.Keep("slow", [b"12345678"])]


class Speculator:
    """Of whatever class."""

    def propose(self, tokens: int) -> int:
        return tokens + 1


class Runner:
    """Model runner V2, which may load its model again."""

    def __init__(self) -> None:
        self.speculator: Any = None

    @hooks.drafting
    def load_model(self) -> str:
        self.speculator = self.speculator or Speculator()
        return "loaded"


def test_the_drafts_of_a_runners_speculator_are_a_stage_however_often_its_model_is_loaded(captured: Captured) -> None:
    runner = Runner()
    assert [runner.load_model(), runner.load_model()] == ["loaded", "loaded"]
    worker = Worker()
    worker.sampling = lambda: runner.speculator.propose(2)
    assert runner.speculator.propose(1) == 2
    worker.execute_model(output())
    worker.sample_tokens(None)
    assert names(captured.step()) == ["forward", "draft"]


def test_a_full_graph_is_the_forward_and_says_so(captured: Captured) -> None:
    run = hooks.full_graph(lambda description: description)
    worker = Worker()
    worker.executing = lambda: run("description")
    worker.execute_model(output(result="output"))
    step = captured.step()
    assert names(step) == ["forward"]
    assert step.attributes is not None
    assert step.attributes[semconv.GRAPH_MODE] == "full"


@pytest.mark.parametrize(
    ("role", "says", "stages"),
    [("WORKER", True, ["kv_load"]), ("WORKER", None, ["kv_load"]), ("WORKER", False, []), ("SCHEDULER", True, [])],
)
def test_a_workers_connector_that_loads_before_the_forward_is_a_stage(
    captured: Captured, role: str, says: bool | None, stages: list[str]
) -> None:
    class Connector:
        def __init__(self) -> None:
            self.role = types.SimpleNamespace(name=role)

        def start_load_kv(self, context: str) -> str:
            return context

    connector = hooks.loading_kv(lambda _config: Connector())("config")
    worker = Worker()
    worker.executing = lambda: connector.start_load_kv("context")
    told = output(result="output")
    if says is not None:  # versions before 0.32 don't
        told.has_sync_kv_loads = says
    worker.execute_model(told)
    assert names(captured.step()) == stages


def test_a_step_whose_engine_is_still_off_is_none(captured: Captured) -> None:
    recorder = captured.recorder
    recorder.obey(on=False)
    recorder.obey(on=True)  # a moment before its engine
    Worker().execute_model(output(result="output", told=False))
    assert captured.steps() == []
