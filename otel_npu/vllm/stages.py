"""Canonical stage names: the scopes of vLLM's and vllm-ascend's model runners, which each version names anew."""

from __future__ import annotations

import enum
import functools
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from otel_npu import semconv

if TYPE_CHECKING:
    from collections.abc import Mapping

_MAX_NAME: Final = 128
_MAX_UNKNOWN: Final = 256


class Timing(enum.Enum):
    """By whose clock a scope is timed."""

    DEVICE = semconv.TIMING_DEVICE
    HOST = semconv.TIMING_HOST
    """It puts no work on the stream that is current at its entry: none at all, or on a stream of its own."""
    IGNORED = "ignored"
    """It is no stage."""


DEVICE: Final = Timing.DEVICE
HOST: Final = Timing.HOST
IGNORED: Final = Timing.IGNORED


class Entry(NamedTuple):
    """What a scope is: its stage's name, its timing, and the attributes that all its stages share."""

    name: str
    timing: Timing
    attributes: dict[str, Any]


def canonical(raw: str) -> Entry:
    """The entry of a scope by its raw name. A name that is not in the table is a stage on the device. Never raises."""
    entry = STAGES.get(raw) if isinstance(raw, str) else None
    return entry or _unknown(raw if isinstance(raw, str) else type(raw).__name__)


@functools.lru_cache(_MAX_UNKNOWN)
def _unknown(raw: str) -> Entry:
    printable = "".join(character if character.isprintable() else " " for character in raw)
    name = " ".join(printable.split())[:_MAX_NAME]
    return _entry(name or "unnamed", name, DEVICE)


def _entry(name: str, raw: str, timing: Timing) -> Entry:
    return Entry(name, timing, {semconv.RAW_NAME: raw} if raw != name else {})


def _table(rows: dict[str, tuple[str, Timing]]) -> Mapping[str, Entry]:
    return {raw: _entry(name, raw, timing) for raw, (name, timing) in rows.items()}


STAGES: Final = _table(
    {
        # vllm-ascend's ProfileExecuteDuration, 0.9.1 to 0.13; some names go on as scopes.
        "prepare input and forward": ("prepare_input_and_forward", DEVICE),  # 0.9.1 only
        "prepare input": ("prepare_input", DEVICE),  # from 0.11
        "forward": ("forward", DEVICE),
        "post process": ("post_process", DEVICE),
        "Sample": ("sample", DEVICE),  # from 0.13
        "Draft": ("draft", DEVICE),  # from 0.13
        "mtp_forward": ("draft_forward", DEVICE),  # inside "Draft"
        # vllm-ascend's scopes, from 0.18.
        "sample_token": ("sample", DEVICE),
        "draft_token": ("draft", DEVICE),
        "async_state_update": ("async_state_update", HOST),  # on the global stream, which becomes current inside
        # Experts go from rank to rank on streams of HCCL's; the stream of the model waits only for their arrival.
        "EPLB weight D2D": ("eplb_transfer", HOST),
        "EPLB generate p2p task": ("eplb_transfer", HOST),  # 0.23, inside the one before
        "EPLB weight D2D wait": ("eplb_transfer_wait", DEVICE),  # 0.23
        "EPLB gather moe load": ("eplb_gather_load", DEVICE),  # 0.23
        "EPLB update": ("eplb_update", DEVICE),  # 0.18 only: the two before, and the copying of what arrived
        # vLLM's scopes, model runner V1, in 0.11.
        "Preprocess": ("prepare_input", DEVICE),
        "Forward": ("forward", DEVICE),
        "Postprocess": ("post_process", DEVICE),
        "Bookkeep": ("bookkeep", HOST),
        "EPLB": ("eplb", DEVICE),
        # And since: they say whose they are.
        "gpu_model_runner: preprocess": ("prepare_input", DEVICE),
        "gpu_model_runner: forward": ("forward", DEVICE),
        "gpu_model_runner: postprocess": ("post_process", DEVICE),
        "gpu_model_runner: sample": ("sample", DEVICE),
        "gpu_model_runner: draft": ("draft", DEVICE),
        "ngram_proposer_gpu: kernel": ("draft_kernel", DEVICE),  # inside the one before
        "gpu_model_runner: bookkeep": ("bookkeep", HOST),  # waits for the sampled tokens
        "gpu_model_runner: eplb": ("eplb", DEVICE),
        "gpu_model_runner: ModelRunnerOutput": ("model_runner_output", HOST),
        "gpu_model_runner: AsyncGPUModelRunnerOutput": ("async_model_runner_output", HOST),  # copies on its own stream
        "gpu_model_runner: set_async_sampled_token_ids": ("set_async_sampled_token_ids", HOST),
        # Model runner V2 has no scopes: these are its methods.
        "prepare_inputs": ("prepare_input", DEVICE),
        "prepare_attn": ("prepare_attention", DEVICE),
        "sample": ("sample", DEVICE),
        "postprocess_sampled": ("post_process", DEVICE),
        "postprocess": ("post_process", DEVICE),  # vllm-ascend 0.18; 0.23 has both
        "pool": ("post_process", DEVICE),  # as in V1, which pools in its scope of that
        # The scheduler: the first is entered once a request.
        "schedule: allocate_slots": ("", IGNORED),
        "schedule: get_num_common_prefix_blocks": ("", IGNORED),  # up to vLLM 0.23
        "schedule: make_cached_request_data": ("", IGNORED),
        "schedule: update_after_schedule": ("", IGNORED),
        # The front end: in one process with the worker these stand round its whole step.
        "llm_engine step: get_output": ("", IGNORED),
        "llm_engine step: process_outputs": ("", IGNORED),
        "llm_engine step: abort_requests": ("", IGNORED),
        "llm_engine step: record_stats": ("", IGNORED),
    }
)
"""Every scope that a supported version has, by its raw name."""
