"""Functions that are stages because the environment names them, in programs of a test's own and in a vLLM's worker."""

from __future__ import annotations

import asyncio
import importlib
import logging
import sys
import textwrap
import types
from typing import TYPE_CHECKING, Any

import pytest

from otel_npu import named_stages
from otel_npu.capture import switch
from otel_npu.settings import NamedStage
from otel_npu.vllm import worker
from tests.helpers.capturing import capturing

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("no_hooks")

SOURCE = """
    def dispatch(tokens):
        return tokens + 1

    class Sampler:
        def sample(self):
            return "sampled"

        @staticmethod
        def warm():
            return "warm"

    async def receive():
        return "received"

    limit = 3
"""


def named(**targets: str) -> tuple[NamedStage, ...]:
    """Stages of the test's module: name=qualified name."""
    return tuple(NamedStage("named_module", qualname, name) for name, qualname in targets.items())


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "named_module.py").write_text(textwrap.dedent(SOURCE))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(named_stages, "_opener", named_stages._Opener())
    yield
    sys.modules.pop("named_module", None)


def imported() -> Any:
    return importlib.import_module("named_module")


@pytest.mark.parametrize("before", [False, True])
def test_named_functions_are_stages_whether_their_module_was_imported_before_or_is_later(*, before: bool) -> None:
    if before:
        imported()
    with capturing(stages=named(moe_dispatch="dispatch", sampler="Sampler.sample", warm="Sampler.warm")) as captured:
        module = imported()
        with switch.step("decode"):
            assert module.dispatch(2) == 3
            assert module.Sampler().sample() == "sampled"
            assert module.Sampler.warm() == "warm"
        assert [stage.name for stage in captured.step().stages] == ["moe_dispatch", "sampler", "warm"]


def test_a_named_coroutine_function_is_a_stage_while_it_runs() -> None:
    async def run() -> str:
        with switch.step("decode"):
            return str(await imported().receive())

    with capturing(stages=named(receive="receive")) as captured:
        assert asyncio.run(run()) == "received"
        assert [stage.name for stage in captured.step().stages] == ["receive"]


@pytest.mark.parametrize("target", ["nothing", "Sampler.nothing", "limit", "Sampler"])
def test_a_target_that_is_no_function_is_one_warning_and_the_rest_goes_on(
    caplog: pytest.LogCaptureFixture, target: str
) -> None:
    with (
        caplog.at_level(logging.WARNING, "otel_npu"),
        capturing(stages=named(one=target, moe_dispatch="dispatch")) as captured,
    ):
        module = imported()
        with switch.step("decode"):
            module.dispatch(2)
        assert [stage.name for stage in captured.step().stages] == ["moe_dispatch"]
    [warning] = [record.getMessage() for record in caplog.records]
    assert f"{target} in named_module" in warning
    assert isinstance(module.Sampler(), module.Sampler)


def test_what_is_compiled_has_no_stages_inside_and_compiles_whole() -> None:
    torch = pytest.importorskip("torch")
    with capturing(stages=named(moe_dispatch="dispatch")) as captured:
        module = imported()
        compiled = torch.compile(lambda tokens: module.dispatch(tokens) * 2, fullgraph=True, backend="eager")
        with switch.step("decode"):
            assert compiled(torch.ones(2)).tolist() == [4, 4]
            module.dispatch(1)
        assert [stage.name for stage in captured.step().stages] == ["moe_dispatch"]


def test_in_an_engines_worker_they_are_stages_of_its_step_and_else_nothing() -> None:
    named_stages.install(named(moe_dispatch="dispatch"), worker.scope)
    module = imported()

    class Worker:
        rank = 0
        vllm_config = types.SimpleNamespace(parallel_config=types.SimpleNamespace(tensor_parallel_size=1, world_size=1))

        @worker.around_execute_model
        def execute_model(self, _scheduler_output: Any) -> Any:
            return module.dispatch(2)

    with capturing(stages=named(moe_dispatch="dispatch")) as captured:
        module.dispatch(2)  # while it warms up, say
        Worker().execute_model(types.SimpleNamespace(total_num_scheduled_tokens=1, num_scheduled_tokens={"a": 1}))
        assert [stage.name for stage in captured.step().stages] == ["moe_dispatch"]
