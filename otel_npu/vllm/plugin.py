"""The plugin: vLLM loads it in each of its processes, several times in some, before or after what it hooks into."""

from __future__ import annotations

import contextlib
import logging
import os
from typing import Final

from otel_npu import announce, hooks, named_stages
from otel_npu.hooks import Hook
from otel_npu.settings import SettingsError
from otel_npu.vllm import engine, front_end, tracing, worker
from otel_npu.wire import rendezvous

_log = logging.getLogger("otel_npu")

_RAY_PREFIXES: Final = "VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY"
_PREFIX: Final = "OTEL_"

_WORKER_HOOKS: Final = (
    ("execute_model", worker.around_execute_model, ("scheduler_output",)),
    ("sample_tokens", worker.around_sample_tokens, ("grammar_output",)),
    ("execute_dummy_batch", worker.around_dummy_batch, ()),
    ("compile_or_warm_up_model", worker.around_warm_up, ()),
)

HOOKS: Final[tuple[Hook, ...]] = (
    # The front end: requests arrive, finish, are aborted.
    Hook(
        "vllm",
        "vllm.v1.engine.output_processor",
        "OutputProcessor.add_request",
        front_end.around_add_request,
        ("request",),
    ),
    Hook(
        "vllm",
        "vllm.v1.engine.output_processor",
        "OutputProcessor.do_tracing",
        front_end.around_tracing,
        ("engine_core_output", "req_state"),
        since="0.10",
    ),
    Hook(
        "vllm",
        "vllm.v1.engine.output_processor",
        "OutputProcessor._update_stats_from_finished",
        front_end.around_finished,
        ("req_state", "finish_reason"),
    ),
    Hook("vllm", "vllm.v1.engine.output_processor", "OutputProcessor.abort_requests", front_end.around_abort),
    Hook(
        "vllm",
        "vllm.v1.engine.output_processor",
        "OutputProcessor.process_outputs",
        front_end.around_process_outputs,
        ("engine_core_outputs",),
        since="0.33",
    ),
    Hook("vllm", "vllm.v1.engine.async_llm", "AsyncLLM.add_request", front_end.around_generate, ("trace_headers",)),
    # The engine: steps are scheduled, and their outputs come back.
    Hook("vllm", "vllm.v1.core.sched.scheduler", "Scheduler.__init__", engine.follow, ("vllm_config",)),
    Hook(
        "vllm_ascend",
        "vllm_ascend.core.recompute_scheduler",
        "RecomputeScheduler.__init__",
        engine.follow,
        ("vllm_config",),
        since="0.11",
        until="0.13",  # from then on it is derived from vLLM's
    ),
    # The workers: steps run.
    *(
        Hook("vllm", "vllm.v1.worker.gpu_worker", f"Worker.{name}", wrap, parameters, since)
        for name, wrap, parameters, since in (
            (*row, "0.11.1" if row[0] == "sample_tokens" else "") for row in _WORKER_HOOKS
        )
    ),
    *(
        Hook(
            "vllm",
            module,
            "RayWorkerWrapper.execute_model_ray",
            worker.around_ray,
            since=since,
            until=until,
        )
        for module, since, until in (
            ("vllm.executor.ray_utils", "", "0.11.1"),
            ("vllm.v1.executor.ray_utils", "0.11.1", "0.33"),  # from then on Ray's workers are ordinary ones
        )
    ),
    Hook("vllm", "vllm.v1.worker.cpu_worker", "CPUWorker.compile_or_warm_up_model", worker.around_warm_up),
    *(
        Hook("vllm_ascend", "vllm_ascend.worker.worker_v1", f"NPUWorker.{name}", wrap, parameters, until="0.13")
        for name, wrap, parameters in _WORKER_HOOKS
        if name != "sample_tokens"
    ),
    *(
        Hook("vllm_ascend", "vllm_ascend.worker.worker", f"NPUWorker.{name}", wrap, parameters, since="0.13")
        for name, wrap, parameters in _WORKER_HOOKS
    ),
    # Their stages: the scopes that are marked in the code, and methods where none are.
    Hook("vllm", "vllm.v1.utils", "record_function_or_nullcontext", worker.take_slot, ("name",), since="0.10"),
    *(
        Hook("vllm_ascend", "vllm_ascend.utils", f"ProfileExecuteDuration.{name}", wrap, until="0.18")
        for name, wrap in (
            ("capture_async", worker.capture_async),
            ("pop_captured_sync", worker.pop_captured_sync),
        )
    ),
    # Where vllm-ascend's scope of the forward begins, its forward context is not there yet.
    Hook(
        "vllm_ascend",
        "vllm_ascend.ascend_forward_context",
        "set_ascend_forward_context",
        worker.noting_graph_mode,
    ),
    *(
        Hook("vllm", "vllm.v1.worker.gpu.model_runner", f"GPUModelRunner.{name}", worker.staged(name), since=since)
        for name, since in (
            ("prepare_inputs", "0.18"),
            ("prepare_attn", "0.18"),
            ("sample", "0.18"),
            ("postprocess_sampled", "0.23"),
            ("pool", "0.18"),
        )
    ),
    Hook("vllm", "vllm.v1.worker.gpu.model_runner", "GPUModelRunner.load_model", worker.drafting, since="0.18"),
    *(
        Hook(
            "vllm_ascend",
            "vllm_ascend.worker.v2.model_runner",
            f"NPUModelRunner.{name}",
            worker.staged(name),
            since="0.23",
        )
        for name in ("prepare_inputs", "postprocess_sampled")
    ),
    Hook("vllm", "vllm.v1.worker.gpu.model_runner", "set_forward_context", worker.forward_inside, since="0.18"),
    Hook(
        "vllm",
        "vllm.v1.worker.gpu.cudagraph_utils",
        "ModelCudaGraphManager.run_fullgraph",
        worker.full_graph,
        since="0.18",
    ),
    Hook("vllm", "vllm.distributed.eplb.eplb_state", "EplbState.step", worker.staged("eplb"), since="0.11"),
    Hook(
        "vllm",
        "vllm.distributed.kv_transfer.kv_connector.factory",
        "KVConnectorFactory.create_connector",
        worker.loading_kv,
        ("role",),
        since="0.10",
    ),
)
"""What is patched, by package and version. Each patch stands alone: one that finds no target is a warning."""


def register() -> None:
    """Turn tracing on in this vLLM process, if the environment says so; else nothing is touched."""
    announce.unknown_names()
    try:
        settings = tracing.settings()
    except SettingsError as error:
        _log.error("%s; tracing is off", error)
        return
    if not settings.enabled:
        return
    with contextlib.suppress(OSError):  # whoever connects says what is wrong with it
        rendezvous.session_id()  # now, so that every process that is started from here has it
    _pass_on_to_ray_workers()
    hooks.install(HOOKS)
    if settings.stages:
        named_stages.install(settings.stages, worker.scope)


def _pass_on_to_ray_workers() -> None:
    """VLLM copies only some variables to workers on other hosts; it can be told of more."""
    prefixes = [prefix for prefix in os.environ.get(_RAY_PREFIXES, "").split(",") if prefix.strip()]
    if _PREFIX not in (prefix.strip() for prefix in prefixes):
        os.environ[_RAY_PREFIXES] = ",".join([*prefixes, _PREFIX])
