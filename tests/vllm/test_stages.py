"""Canonical stage names."""

from __future__ import annotations

from typing import Any

import pytest

from otel_npu import semconv
from otel_npu.vllm import stages


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        ("prepare input", "prepare_input"),
        ("gpu_model_runner: preprocess", "prepare_input"),
        ("prepare_inputs", "prepare_input"),
        ("post process", "post_process"),
        ("gpu_model_runner: postprocess", "post_process"),
        ("sample_token", "sample"),
        ("Draft", "draft"),
        ("mtp_forward", "draft_forward"),
    ],
)
def test_a_stage_has_one_name_in_every_version_and_keeps_its_raw_one(raw: str, name: str) -> None:
    assert stages.canonical(raw) == (name, stages.DEVICE, {semconv.RAW_NAME: raw})


@pytest.mark.parametrize(
    "raw", ["gpu_model_runner: bookkeep", "gpu_model_runner: ModelRunnerOutput", "async_state_update"]
)
def test_what_leaves_the_stream_alone_is_timed_by_the_host(raw: str) -> None:
    assert stages.canonical(raw).timing is stages.HOST


@pytest.mark.parametrize("raw", ["schedule: allocate_slots", "llm_engine step: get_output"])
def test_scopes_of_the_scheduler_and_the_front_end_are_no_stages(raw: str) -> None:
    assert stages.canonical(raw).timing is stages.IGNORED


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        ("gpu_model_runner: something new", "gpu_model_runner: something new"),
        (" two\nlines\t", "two lines"),
        ("half a \ud800 pair", "half a pair"),
        ("x" * 1000, "x" * 128),
        ("", "unnamed"),
        (None, "NoneType"),
        ([], "list"),
    ],
)
def test_an_unknown_scope_is_a_stage_on_the_device_by_a_name_fit_for_a_span(raw: Any, name: str) -> None:
    entry = stages.canonical(raw)
    assert (entry.name, entry.timing) == (name, stages.DEVICE)
    entry.name.encode()


def test_names_in_the_table_are_words_joined_by_underscores() -> None:
    names = {entry.name for entry in stages.STAGES.values() if entry.timing is not stages.IGNORED}
    assert all(name.replace("_", "").isalpha() and name.islower() for name in names)


def test_unknown_names_do_not_pile_up() -> None:
    for number in range(10_000):
        stages.canonical(f"layer {number}")
    assert stages._unknown.cache_info().currsize <= 256
