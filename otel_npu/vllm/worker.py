"""A worker's steps and stages: what vLLM and vllm-ascend run on the device, in the scopes that they mark."""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import types
from typing import TYPE_CHECKING, Any, Final

from otel_npu import semconv
from otel_npu.capture import switch
from otel_npu.capture.context import NO_RANK, Ids, open_step
from otel_npu.capture.records import Rank, new_stage, new_step
from otel_npu.capture.stages import Stage
from otel_npu.capture.steps import Step
from otel_npu.ids import new_bytes
from otel_npu.native import native
from otel_npu.vllm import stages, tracing
from otel_npu.vllm.engine import STEP_ATTRIBUTE, WORKER_ATTRIBUTE
from otel_npu.wire import frames

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from otel_npu.capture.recorder import Recorder

_DUMMY: Final = "dummy"
_FORWARD: Final = "forward"
_DRAFT: Final = "draft"
_KV_LOAD: Final = "kv_load"
_FULL: Final = "full"
_GRAPH_MODES: Final = 16


class _Loads(threading.local):
    """Of this thread's step.

    Attributes:
        any: Whether it loads KV cache before its forward; versions that don't say may.
    """

    any: bool = True


_loads: Final = _Loads()
_connectors = False
"""Whether there is a connector to load from."""


if TYPE_CHECKING or native is None:

    class WorkerRecord:
        """What is to be known of a worker when a usual step of it begins and ends.

        Attributes:
            rank: Which it is.
            step: Its open step.
            told: What knows the worker's attributes already; None while there is a warm-up.
            usual: Whether its steps need nothing but to be opened, and closed when it has sampled.
        """

        rank: Rank
        step: Step | None
        told: Recorder | None
        usual: bool

else:
    WorkerRecord = native.WorkerRecord


class WorkerSteps(WorkerRecord):
    """The steps of one worker, each from `execute_model` to the call that returns its output."""

    def __init__(self, worker: Any) -> None:
        config = worker.vllm_config
        self._endpoint = tracing.config_endpoint(config)
        self.rank, self.attributes = _rank(worker.rank, config.parallel_config)
        self.told = self.step = None
        self.usual = False
        self._warming_up = False
        self._worker = worker

    @functools.cached_property
    def samples(self) -> bool:
        """Whether `sample_tokens` follows: not for pooling, and not in versions that have no such call."""
        worker = self._worker
        return hasattr(worker, "sample_tokens") and not getattr(worker.model_runner, "is_pooling_model", False)

    def open(self, scheduler_output: Any) -> None:
        """A step begins, if it runs the model."""
        if self.step is not None:
            self.close()
        recorder = switch._recorder
        if recorder is None or recorder is not self.told:  # nearly always it is, and two calls less are made
            recorder = self._recorder()
        if recorder is None or not scheduler_output.total_num_scheduled_tokens:
            return
        self.usual = self.samples and not _connectors
        if _connectors:
            _loads.any = getattr(scheduler_output, "has_sync_kv_loads", True)
        told = getattr(scheduler_output, STEP_ATTRIBUTE, None)
        if told is None:
            if recorder.was_switched:  # its engine is off still, or already
                return
            self._open(new_step(Step, recorder, "", (), None, None, self.rank))
            return
        trace_id, span_id, number, kind, kept, slow = told
        if slow:  # this worker's relay may be another than the engine's
            recorder.send(frames.Keep(semconv.SLOW, list(slow)))
        ids = _new_tuple(Ids, (trace_id, new_bytes(8), span_id, kept))
        self._open(new_step(Step, recorder, kind, (), None, ids, self.rank, number))

    def open_dummy(self) -> None:
        """A step begins that only keeps the other ranks company: one stage, `forward`, and nothing inside it."""
        self.close()
        recorder = self._recorder()
        if recorder is not None:
            self._open(new_step(Step, recorder, _DUMMY, (), None, None, self.rank))

    def warm_up(self, *, on: bool) -> None:
        """Warm-up begins, and its steps are nothing; or it is over.

        The recorder is made now, so that the relay has started when the first step comes.
        """
        self._warming_up = on
        self.told = None
        tracing.recorder(self._endpoint)

    def close(self, error: type[BaseException] | None = None) -> None:
        """The open step, if there is one, is over."""
        step, self.step = self.step, None
        if step is not None:
            step.close(error)

    def _open(self, step: Step) -> None:
        step.open()
        if step.closed_ns == 0:
            self.step = step

    def _recorder(self) -> Recorder | None:
        if self._warming_up:
            return None
        recorder = tracing.recorder(self._endpoint)
        if recorder is not self.told and recorder is not None:
            recorder.describe(self.rank, self.attributes)
            self.told = recorder
        return recorder


_new_tuple: Final = tuple.__new__


def _of(worker: Any) -> WorkerSteps:
    try:
        return worker.__dict__[WORKER_ATTRIBUTE]  # type: ignore[no-any-return]
    except KeyError:
        steps = worker.__dict__[WORKER_ATTRIBUTE] = WorkerSteps(worker)
        return steps


def _end(worker: Any, error: type[BaseException] | None = None) -> None:
    try:
        _of(worker).close(error)
    except Exception:
        tracing.fault()


@tracing.guarded
def _begin_dummy(worker: Any) -> None:
    _of(worker).open_dummy()


@tracing.guarded
def _warm_up(worker: Any, *, on: bool) -> None:
    _of(worker).warm_up(on=on)


def around_execute_model(execute_model: Callable[..., Any]) -> Callable[..., Any]:
    """`Worker.execute_model`: the step begins; it ends here if the output is returned, or nobody will sample."""

    # Without `tracing.guarded`, for what runs with each step: another call costs, where nothing is in the caches.
    def call(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            _of(self).open(scheduler_output)
        except Exception:
            tracing.fault()
        try:
            output = execute_model(self, scheduler_output, *args, **kwargs)
        except BaseException as error:
            _end(self, type(error))
            raise
        try:
            steps = _of(self)
            if output is not None or not steps.samples:
                steps.close()
        except Exception:
            tracing.fault()
        return output

    return call if native is None else native.around_execute_model(execute_model, call)


def around_sample_tokens(sample_tokens: Callable[..., Any]) -> Callable[..., Any]:
    """`Worker.sample_tokens`: the step ends."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            output = sample_tokens(self, *args, **kwargs)
        except BaseException as error:
            _end(self, type(error))
            raise
        _end(self)
        return output

    return call if native is None else native.around_sample_tokens(sample_tokens, call)


def around_dummy_batch(execute_dummy_batch: Callable[..., Any]) -> Callable[..., Any]:
    """`Worker.execute_dummy_batch`: an idle data-parallel rank runs the model because the others wait for it."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        _begin_dummy(self)
        try:
            with _dummy_forward():
                output = execute_dummy_batch(self, *args, **kwargs)
        except BaseException as error:
            _end(self, type(error))
            raise
        _end(self)
        return output

    return call


def around_warm_up(compile_or_warm_up_model: Callable[..., Any]) -> Callable[..., Any]:
    """`Worker.compile_or_warm_up_model`: its steps are none of a request's."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        _warm_up(self, on=True)
        try:
            return compile_or_warm_up_model(self, *args, **kwargs)
        finally:
            _warm_up(self, on=False)

    return call


def around_ray(execute_model_ray: Callable[..., Any]) -> Callable[..., Any]:
    """`RayWorkerWrapper.execute_model_ray`: Ray's compiled graph goes past the worker, to its model runner."""

    def call(self: Any, given: Any, *args: Any, **kwargs: Any) -> Any:
        _begin_in_ray(self, given[0] if isinstance(given, tuple) else given)
        try:
            output = execute_model_ray(self, given, *args, **kwargs)
        except BaseException as error:
            _end_in_ray(self, type(error))
            raise
        _end_in_ray(self)
        return output

    return call


@tracing.guarded
def _begin_in_ray(wrapper: Any, scheduler_output: Any) -> None:
    _of(wrapper.worker).open(scheduler_output)


@tracing.guarded
def _end_in_ray(wrapper: Any, error: type[BaseException] | None = None) -> None:
    _of(wrapper.worker).close(error)


def _open_step() -> Any:
    """The worker's step that is open here; None if there is none, or only one of the program's."""
    step = open_step.get()
    while step is not None and (step.rank is NO_RANK or step.closed_ns != 0):
        step = step.outer
    return step


# Scopes.


def scope(name: str) -> contextlib.AbstractContextManager[None]:
    """A scope of vLLM's or vllm-ascend's: a stage of the worker's step that is open here, else nothing."""
    step = _open_step()
    if step is None or step.kind == _DUMMY or switch._recorder is not step.capture:
        return _NOTHING
    entry = stages.STAGES.get(name) if type(name) is str else None  # nearly always there
    if entry is None:
        entry = stages.canonical(name)
    canonical, timing, attributes = entry
    if timing is stages.IGNORED:
        return _NOTHING
    if canonical == _FORWARD:
        _add_graph_mode(step)
    return new_stage(Stage, step.capture, canonical, attributes, timing is stages.HOST)


_NOTHING: Final = contextlib.nullcontext()

if native is not None:
    # The function above for all that is in the table, without an interpreter.
    scope = native.scope_in_front(
        scope,
        {
            raw: None
            if entry.timing is stages.IGNORED
            else (entry.name, entry.attributes, entry.timing is stages.HOST, entry.name == _FORWARD)
            for raw, entry in stages.STAGES.items()
        },
        _NOTHING,
        _DUMMY,
    )


def take_slot(record_function_or_nullcontext: Callable[..., Any]) -> Callable[..., Any]:
    """`vllm.v1.utils.record_function_or_nullcontext`: vLLM keeps a slot for what it is to call; ours goes there.

    What would have been called is called too. vLLM itself chooses it, at the first scope, by its own settings.
    """
    module = getattr(record_function_or_nullcontext, "__globals__", {})
    if "_PROFILER_FUNC" not in module:  # before there was a slot, or somebody else has wrapped it
        return _beside(record_function_or_nullcontext)
    there = module["_PROFILER_FUNC"]

    def first(name: str) -> Any:
        # It puts its choice into the slot: of a module of its own, so that no other thread finds it there meanwhile.
        apart = {**module, "_PROFILER_FUNC": None}
        types.FunctionType(record_function_or_nullcontext.__code__, apart)(name)
        module["_PROFILER_FUNC"] = chosen = _beside(apart["_PROFILER_FUNC"])
        return chosen(name)

    module["_PROFILER_FUNC"] = _beside(there) if there is not None else first
    return record_function_or_nullcontext


def _beside(other: Callable[..., Any] | None) -> Callable[[str], Any]:
    """Our scope, with another round it that somebody else has asked for."""
    if other is None or other is contextlib.nullcontext:
        return scope

    def both(name: str) -> Any:
        ours = scope(name)
        return other(name) if ours is _NOTHING else _Both(other(name), ours)

    return both


class _Both:
    """Two scopes as one."""

    def __init__(self, outer: Any, inner: Any) -> None:
        self._outer, self._inner = outer, inner

    def __enter__(self) -> None:
        self._outer.__enter__()
        self._inner.__enter__()

    def __exit__(self, *error: object) -> None:
        try:
            self._inner.__exit__(*error)
        finally:
            self._outer.__exit__(*error)


def staged(raw_name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A method without a scope of its own: all of it is the stage of this raw name, what it overrides included."""

    def wrap(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with scope(raw_name) if not _is_open(raw_name) else _NOTHING:
                return method(*args, **kwargs)

        return call

    return wrap


def _is_open(raw_name: str) -> bool:
    step = _open_step()
    last = step.stages[-1] if step is not None and step.stages else None
    return last is not None and not last.exited_ns and last.name == stages.canonical(raw_name).name


def forward_inside(set_forward_context: Callable[..., Any]) -> Callable[..., Any]:
    """Model runner V2's `set_forward_context`: three of the four ways in which its forward runs stand inside it."""

    @contextlib.contextmanager
    def call(*args: Any, **kwargs: Any) -> Iterator[Any]:
        with set_forward_context(*args, **kwargs) as entered, scope(_FORWARD):
            yield entered

    return call


def full_graph(run_fullgraph: Callable[..., Any]) -> Callable[..., Any]:
    """Model runner V2's `run_fullgraph`: its forward as one graph, which is in no forward context."""
    run = staged(_FORWARD)(run_fullgraph)

    def call(*args: Any, **kwargs: Any) -> Any:
        step = _open_step()
        if step is not None:
            step.attributes = _graph_mode(_FULL)
        return run(*args, **kwargs)

    return call


def drafting(load_model: Callable[..., Any]) -> Callable[..., Any]:
    """Model runner V2's `load_model`, after which its speculator, of whatever kind, is there to stay."""
    prepare = tracing.guarded(_stage_drafts)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = load_model(self, *args, **kwargs)
        prepare(getattr(self, "speculator", None))
        return result

    return call


def _stage_drafts(speculator: Any) -> None:
    if hasattr(speculator, "propose"):
        _stage_method(speculator, "propose", staged(_DRAFT))


def loading_kv(create_connector: Callable[..., Any]) -> Callable[..., Any]:
    """`KVConnectorFactory.create_connector`: where a worker's loads, before the step's forward, is a stage."""
    prepare = tracing.guarded(_stage_loads)

    def call(*args: Any, **kwargs: Any) -> Any:
        connector = create_connector(*args, **kwargs)
        prepare(connector)
        return connector

    return call


def _stage_loads(connector: Any) -> None:
    global _connectors  # noqa: PLW0603
    if getattr(connector.role, "name", "") == "WORKER":
        _stage_method(connector, "start_load_kv", _staged_load)
        _connectors = True


def _staged_load(start_load_kv: Callable[..., Any]) -> Callable[..., Any]:
    load = staged(_KV_LOAD)(start_load_kv)

    def call(*args: Any, **kwargs: Any) -> Any:  # of every step, most of which load nothing
        return load(*args, **kwargs) if _loads.any else start_load_kv(*args, **kwargs)

    return call


def _stage_method(owner: Any, name: str, wrap: Callable[..., Any]) -> None:
    """Wrap a method on one object, once: its class may be anybody's."""
    method = getattr(owner, name)
    if not hasattr(method, "__wrapped__") or name not in vars(owner):
        setattr(owner, name, functools.wraps(method)(wrap(method)))


def noting_graph_mode(set_forward_context: Callable[..., Any]) -> Callable[..., Any]:
    """A forward context that is entered within the scope of the forward: it says in which mode that runs."""

    @contextlib.contextmanager
    def call(*args: Any, **kwargs: Any) -> Iterator[Any]:
        with set_forward_context(*args, **kwargs) as entered:
            step = _open_step()
            if step is not None:
                _add_graph_mode(step)
            yield entered

    return call


def capture_async(_: Callable[..., Any]) -> Callable[..., Any]:
    """vllm-ascend's `ProfileExecuteDuration.capture_async`: a scope like any other, with no events of its own."""

    def call(_self: Any, duration_tag: str) -> contextlib.AbstractContextManager[None]:
        return scope(duration_tag)

    return call


def pop_captured_sync(_: Callable[..., Any]) -> Callable[..., Any]:
    """vllm-ascend's `pop_captured_sync`, which it calls in every step: there is nothing to pop and to wait for."""

    def call(_self: Any) -> dict[str, float]:
        return {}

    return call


@contextlib.contextmanager
def _dummy_forward() -> Iterator[None]:
    step = _open_step()
    if step is None:
        yield
        return
    with new_stage(Stage, step.capture, _FORWARD, {}):
        yield


def _add_graph_mode(step: Step) -> None:
    forward_context = sys.modules.get("vllm.forward_context")
    mode = getattr(getattr(forward_context, "_forward_context", None), "cudagraph_runtime_mode", None)
    name = getattr(mode, "name", None)
    if isinstance(name, str):
        step.attributes = attributes = _graph_mode(name)
        if native is not None:
            native.remember_mode(mode, attributes)


@functools.lru_cache(_GRAPH_MODES)
def _graph_mode(name: str) -> dict[str, Any]:
    """All that a worker says of one of its steps; the same for all steps of a mode."""
    return {semconv.GRAPH_MODE: name.lower()}


def _rank(number: int, parallel: Any) -> tuple[Rank, frames.Attributes]:
    """Which rank this is, and its place in each kind of parallelism.

    As vLLM lays ranks out: tensor-parallel ranks next to one another, then pipeline stages; the engine waits for the
    first tensor-parallel rank of the last stage. Under an external launcher ranks count on from replica to replica.
    """
    across = parallel.tensor_parallel_size * getattr(parallel, "prefill_context_parallel_size", 1)
    replica = across * getattr(parallel, "pipeline_parallel_size", parallel.world_size // across)
    inside = number % replica
    data_parallel_rank = getattr(parallel, "data_parallel_rank", 0)
    place: frames.Attributes = {
        semconv.TP_RANK: inside % parallel.tensor_parallel_size,
        semconv.PP_RANK: inside // across,
        # The rank is 0 on every replica of a dense model, because they have nothing to do with each other.
        semconv.DP_RANK: getattr(parallel, "data_parallel_index", data_parallel_rank),
        semconv.STEP_RANKS: replica,
    }
    return Rank(number, returns_output=inside == replica - across), place
