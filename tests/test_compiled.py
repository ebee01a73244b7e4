"""Stages and steps inside of what torch.compile compiles: measured where they may break the graph, never in the way."""

from __future__ import annotations

import importlib.util
import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.helpers import REPOSITORY

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = [
    pytest.mark.slow,
    # Looked for, not imported: that takes seconds, here and in whatever process only collects the tests.
    pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed"),
]

# Compiles functions and calls them thrice. Gives of each how many graph breaks there were, and how many stages of which
# name were captured.
PROGRAM = """
import json, sys, torch
from collections import Counter
import otel_npu
from otel_npu.capture import switch

def inside(x):
    with otel_npu.stage("inside", layer=1):
        y = torch.relu(x) + 1
    return y * 2

@otel_npu.stage("decorated")
def one(x):
    return torch.relu(x) + 1

def decorated(x):
    return one(x) * 2

def a_step(x):
    with otel_npu.step("decode", requests=["nonsense"]):
        with otel_npu.stage("in a step"):
            y = torch.relu(x) + 1
    return y * 2

def opened(x):
    step = otel_npu.step("decode").open()
    y = torch.relu(x) + 1
    step.close()
    return y * 2

assert {native} or "otel_npu._native" not in sys.modules

def captured():
    recorder = switch.current_recorder()
    if recorder is None:
        return {{}}
    names = Counter()
    for thread in recorder.threads:
        for step in thread.pending:
            names.update(stage.name for stage in step.stages)
        thread.pending.clear()
    return dict(names)

{prepare}
x = torch.randn(8)
wanted = (torch.relu(x) + 1) * 2
found = {{}}
for function in (inside, decorated, a_step, opened):
    for whole in (False, True):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        compiled = torch.compile(function, backend="{backend}", fullgraph=whole)
        captured()
        for _ in range(3):
            with otel_npu.step("around"), otel_npu.stage("around"):
                torch.testing.assert_close(compiled(x), wanted)
        breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
        found[function.__name__ + (" whole" if whole else "")] = [breaks, captured()]
print(json.dumps(found))
"""


@pytest.fixture
def compiled(run_program: Callable[..., Any]) -> Callable[..., tuple[dict[str, Any], str]]:
    """What became of each function, and the log."""

    def run(
        *, enabled: bool, native: bool = True, prepare: str = "", backend: str = "eager"
    ) -> tuple[dict[str, Any], str]:
        done = run_program(
            PROGRAM.format(native=native, prepare=prepare, backend=backend),
            {
                "OTEL_NPU_ENABLED": "01"[enabled],
                "OTEL_NPU_PURE_PYTHON": "10"[native],
                "OTEL_NPU_DEVICE": "cpu",
                "OTEL_NPU_EXPORT": "inprocess",
                "OTEL_TRACES_EXPORTER": "none",
                "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
            },
        )
        return json.loads(done.stdout.splitlines()[-1]), done.stderr

    return run


HOLD = """
# What is captured waits: nothing is resolved before it is looked at.
recorder = switch.current_recorder()
type(recorder).resolve = lambda *_: None
type(recorder.idle).resolve = lambda *_: None
"""


@pytest.mark.parametrize("native", [True, False])
def test_a_stage_is_measured_where_the_graph_may_be_broken_and_left_out_once_said_where_not(
    compiled: Callable[..., tuple[dict[str, Any], str]], native: bool
) -> None:
    found, log = compiled(enabled=True, native=native, prepare=HOLD)
    around = {"around": 3}
    for name, stage in (("inside", "inside"), ("decorated", "decorated"), ("a_step", "in a step")):
        assert found[name][1] == {**around, stage: 3}
        assert found[f"{name} whole"] == [0, around]
        assert log.count(f"{stage!r} is inside a function that torch.compile may not break") == 1
    assert found["opened"][1] == found["opened whole"][1] == around
    assert "Traceback" not in log
    assert "Dynamo does not know" not in log


def test_while_tracing_is_off_no_graph_is_broken(compiled: Callable[..., tuple[dict[str, Any], str]]) -> None:
    found, log = compiled(enabled=False)
    assert {tuple(breaks for breaks, _ in found.values())} == {(0,) * 8}
    assert "not measured" not in log


def test_what_was_compiled_while_tracing_was_off_is_measured_once_it_is_on(run_program: Callable[..., Any]) -> None:
    run_program(
        """
        import torch, otel_npu
        from otel_npu.capture import switch

        def model(x):
            with otel_npu.stage("inside"):
                return torch.relu(x) + 1

        compiled = torch.compile(model, backend="eager")
        x = torch.randn(8)
        otel_npu.disable()
        compiled(x)
        for _ in range(2):
            assert otel_npu.enable()
            recorder = switch.current_recorder()
            recorder.resolve = lambda *_: None
            recorder.idle.resolve = lambda *_: None
            compiled(x)
            [thread] = [thread for thread in recorder.threads if thread.pending]
            assert [stage.name for step in thread.pending for stage in step.stages] == ["inside"]
            thread.pending.clear()
            otel_npu.disable()
            compiled(x)
        """,
        {
            "OTEL_NPU_DEVICE": "cpu",
            "OTEL_NPU_EXPORT": "inprocess",
            "OTEL_TRACES_EXPORTER": "none",
            "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        },
    )


def test_a_dynamo_that_is_not_what_we_know_is_one_warning(
    run_program: Callable[..., Any],
) -> None:
    done = run_program(
        """
        import sys, torch
        import torch._dynamo.decorators
        def refuse(*args, **kwargs):
            raise TypeError("not known here")
        torch._dynamo.decorators.substitute_in_graph = refuse
        import otel_npu
        with otel_npu.stage("forward"):
            pass
        """,
        {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
    )
    assert done.stderr.count("could not be hooked") == 1


def test_a_torch_without_dynamo_is_no_fault(run_program: Callable[..., Any], tmp_path: Path) -> None:
    folder = tmp_path / "torch"
    folder.mkdir()
    folder.joinpath("__init__.py").write_text("__version__ = '1.13'")
    assert run_program("import otel_npu", {"PYTHONPATH": f"{tmp_path}:{REPOSITORY}"}).stderr == ""
