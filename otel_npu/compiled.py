"""Stages and steps inside a function that `torch.compile` compiles.

A graph has no place for the records of events: what a compiler makes of it need not run in the order of the program's
lines. So a stage breaks the graph, as all does that Dynamo does not know, and is measured at every call. Where the
graph may not be broken (`fullgraph=True`, as vLLM compiles its models) it is left out, which is said once. While
tracing is off there is nothing to measure, and nothing is broken. None of this runs before Dynamo is imported.
"""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Any, Final

from otel_npu import hooks
from otel_npu.capture import switch
from otel_npu.capture.off import OffStage, OffStep

if TYPE_CHECKING:
    from collections.abc import Callable

_log = logging.getLogger("otel_npu")

# What Dynamo may read: the rest of us it would compile, to no avail, wherever a program that is compiled calls it.
_READABLE: Final = frozenset({"off", "decorate"})

_said: set[str] = set()


def install() -> None:
    """Tell Dynamo, now or as soon as it has been imported."""
    hook = hooks.Hook("torch", "torch._dynamo", "disable", _teach)
    if "torch._dynamo" in sys.modules or hooks.check(hook) is None:  # a torch that has none is no fault
        hooks.install([hook])


def _teach(disable: Callable[..., Any]) -> Callable[..., Any]:
    """Dynamo reads the functions below in the place of `stage()` and `step()`. Nothing of its own is replaced."""
    from torch._dynamo import trace_rules
    from torch._dynamo.decorators import assume_constant_result, substitute_in_graph

    for module in [name for name in sys.modules if name.startswith(("otel_npu.capture.", "otel_npu.wire."))]:
        if module.rpartition(".")[2] not in _READABLE:
            trace_rules.add(module)
    is_left_out = assume_constant_result(_is_left_out)
    measured_stage, measured_step = disable(switch.stage), disable(switch.step)

    def stage(name: str, /, **attributes: Any) -> Any:
        if (switch._decided and switch._recorder is None) or is_left_out(name):
            return OffStage(name, attributes)
        return measured_stage(name, **attributes)

    def step(kind: str = "", /, *, requests: Any = (), **attributes: Any) -> Any:
        if (switch._decided and switch._recorder is None) or is_left_out(kind):
            return OffStep()
        return measured_step(kind, requests=requests, **attributes)

    substitute_in_graph(switch.stage, skip_signature_check=True)(stage)
    substitute_in_graph(switch.step, skip_signature_check=True)(step)
    return disable


def _is_left_out(name: str) -> bool:
    """Whether what is being compiled must be one graph. Called by Dynamo while it compiles."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    compiling = InstructionTranslator.current_tx()
    if not (compiling.one_graph or getattr(compiling, "error_on_graph_break", False)):
        return False
    if name not in _said and switch._recorder is not None:
        _said.add(name)
        _log.warning("%r is inside a function that torch.compile may not break (fullgraph): it is not measured", name)
    return True
