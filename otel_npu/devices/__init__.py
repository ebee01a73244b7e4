"""Kinds of devices: what records an event, says whether it is done, and reads when it happened.

Each kind is one small class in a module of its own. All of them answer to `Device`.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from typing import TYPE_CHECKING, Any, Final

from otel_npu.devices.cpu import Cpu
from otel_npu.devices.npu import Npu
from otel_npu.devices.simulated import default_device
from otel_npu.devices.torch_event import TorchEvents

if TYPE_CHECKING:
    from otel_npu.devices.device import Device

# Torch has these from its build or never; other kinds come with modules that may be imported later.
_BUILT_IN: Final = frozenset({"cuda", "mps", "mtia", "xpu"})


def find(kind: str) -> Device | None:
    """The device of this kind, once it can be used without side effects; None while it can't.

    An accelerator counts only when the program itself has initialised it: recording an event before that
    would choose a device on the program's behalf.

    Raises:
        ValueError: There can be no such device in this process; the text says why.
    """
    if kind == "cpu":
        return Cpu()
    if kind == "simulated":
        return default_device()
    torch = sys.modules.get("torch")
    accelerator = _accelerator(torch)
    if accelerator is None:
        imported = hasattr(torch, "accelerator")  # not while it is still being imported
        if imported and kind in _BUILT_IN:
            raise ValueError("this torch was built without it")
        if kind != "auto":
            _may_come(kind)
        return find("cpu") if imported and kind == "auto" else None
    if kind not in ("auto", accelerator):
        raise ValueError(f"torch's accelerator here is {accelerator!r}, not {kind!r}")
    if not getattr(torch, accelerator).is_initialized():
        return None
    return _open(accelerator)


@functools.cache
def _may_come(kind: str) -> None:
    """Whether an accelerator of this kind could still be there later: until then nobody knows it.

    Raises:
        ValueError: It can't.
    """
    module = "torch_npu" if kind == "npu" else "torch"
    if importlib.util.find_spec(module) is None:
        raise ValueError(f"{module} is not installed")
    torch = sys.modules.get("torch")
    if kind != "npu" and hasattr(torch, "device"):
        try:
            torch.device(kind)  # type: ignore[union-attr]
        except RuntimeError:
            raise ValueError("torch knows no such device") from None


@functools.cache
def _open(accelerator: str) -> Device:
    """The one device of a process: it has the events, and they outlive whoever records them."""
    if accelerator == "npu":
        return Npu.open()
    return TorchEvents(accelerator)


def _accelerator(torch: Any) -> str | None:
    accelerator = getattr(torch, "accelerator", None)  # absent while torch is still being imported
    if accelerator is None and "torch_npu" in sys.modules and hasattr(torch, "npu"):
        return "npu"  # before torch 2.6 there is no such module
    # What torch was built for: asking whether one is there could initialise it, and so spoil a later fork.
    current = accelerator.current_accelerator() if accelerator is not None else None
    return None if current is None else str(current.type)
