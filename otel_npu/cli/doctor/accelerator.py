"""The checks of torch and the device. They run in a process of their own, because any of them may hang or crash."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from otel_npu import devices, host
from otel_npu.cli.doctor import sources
from otel_npu.cli.doctor.findings import Finding, Status, failed, first_line, not_applicable, ok, warning
from otel_npu.cli.doctor.settings import wanted_device
from otel_npu.devices.device import Pair, Pool

if TYPE_CHECKING:
    from collections.abc import Iterator

    from otel_npu.devices.device import Device

TORCH: Final = "torch"
TORCH_NPU: Final = "torch_npu"
CANN: Final = "CANN library"
DEVICES: Final = "devices"
EVENTS: Final = "timing events"
CLOCK: Final = "device clock"
CHECKS: Final = (TORCH, TORCH_NPU, CANN, DEVICES, EVENTS, CLOCK)

_LIBRARY: Final = "libascendcl.so"
# What `otel_npu.devices.npu` calls.
_SYMBOLS: Final = (
    "aclrtEventGetTimestamp",
    "aclrtEventElapsedTime",
    "aclrtCreateStream",
    "aclrtCreateEventExWithFlag",
    "aclrtRecordEvent",
    "aclrtQueryEventStatus",
)
_SET_ENV: Final = "source CANN's set_env.sh (/usr/local/Ascend/ascend-toolkit/set_env.sh)"
_NODES: Final = "/dev/davinci*, /dev/davinci_manager, /dev/devmm_svm and /dev/hisi_hdc"
_EVENT_SECONDS: Final = 3.0
_DISAGREEMENT_NS: Final = 1000
_PINGS: Final = 100
_PING_PAUSE_SECONDS: Final = 0.002
_PING_BUDGET_NS: Final = 100_000  # as the recorder's
_MISSING_LIBRARY: Final = re.compile(r"(lib\S+\.so\S*): cannot open shared object file")


def checks() -> Iterator[Finding]:
    """All of them in order, each resting on the one before."""
    kind = wanted_device()
    if kind in ("cpu", "simulated"):
        yield from _skip(CHECKS, not_applicable, f"not used: OTEL_NPU_DEVICE={kind}")
        return
    # torch must not load torch_npu by itself: then it could not be told which of the two fails.
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    if importlib.util.find_spec("torch") is None:
        yield failed(TORCH, "not installed", "pip install torch, of the version that your torch_npu is made for")
        yield from _skip(CHECKS[1:], warning, "not checked without torch")
        return
    try:
        import torch
    except Exception as error:
        yield failed(TORCH, f"can't be imported: {first_line(error)}", "install torch anew")
        yield from _skip(CHECKS[1:], warning, "not checked without torch")
        return
    version = str(getattr(torch, "__version__", "of unknown version"))
    yield ok(TORCH, version)
    if kind not in ("auto", "npu"):
        yield from _skip((TORCH_NPU, CANN), not_applicable, f"not used: OTEL_NPU_DEVICE={kind}")
        yield from _other(torch, kind)
    elif importlib.util.find_spec("torch_npu") is not None:
        yield from _npu(torch, version)
    elif kind == "npu" or host.npus():
        why = "OTEL_NPU_DEVICE=npu asks for it" if kind == "npu" else f"this host has {len(host.npus())} NPUs"
        cure = f"pip install torch-npu=={'.'.join(_minor(version))}.*, which goes with torch {version}"
        yield failed(TORCH_NPU, f"not installed, but {why}", cure)
        yield from _skip(CHECKS[2:], warning, "not checked without torch_npu")
    else:
        yield not_applicable(TORCH_NPU, "not installed, and there is no NPU here")
        yield not_applicable(CANN, "no NPU here")
        yield from _other(torch, kind)


def _npu(torch: Any, version: str) -> Iterator[Finding]:
    """The checks where torch_npu is installed."""
    try:
        import torch_npu
    except Exception as error:
        yield from _not_imported(error)
        yield from _skip(CHECKS[3:], warning, "not checked without torch_npu")
        return
    npu_version = str(getattr(torch_npu, "__version__", "of unknown version"))
    if _minor(npu_version) != _minor(version):
        cure = f"pip install torch-npu=={'.'.join(_minor(version))}.*, or the torch that torch_npu is made for"
        yield failed(TORCH_NPU, f"{npu_version} with torch {version}", cure)
    else:
        yield ok(TORCH_NPU, npu_version)
    library = _library(npu_version)
    yield library
    try:
        count = int(torch.npu.device_count())
    except Exception as error:
        yield failed(DEVICES, first_line(error), f"see whether npu-smi info shows them; {_in_a_container()}")
        yield from _skip((EVENTS, CLOCK), warning, "not checked without a device")
        return
    if not count:
        hidden = os.environ.get("ASCEND_RT_VISIBLE_DEVICES")
        because = f" that ASCEND_RT_VISIBLE_DEVICES={hidden!r} shows" if hidden is not None else ""
        yield failed(DEVICES, f"no NPU{because}", f"see whether npu-smi info shows one; {_in_a_container()}")
        yield from _skip((EVENTS, CLOCK), warning, "not checked without a device")
        return
    yield ok(DEVICES, f"{count} x {torch.npu.get_device_name(0)}{_versions()}")
    if library.status is not Status.OK:
        yield from _skip((EVENTS, CLOCK), warning, f"not checked without the {CANN}")
        return
    yield from _measurements(lambda: torch.npu.set_device(0), "npu")


def _not_imported(error: Exception) -> Iterator[Finding]:
    missing = _MISSING_LIBRARY.search(str(error))
    if missing:
        yield ok(TORCH_NPU, sources.version(TORCH_NPU))
        yield failed(
            CANN, f"{missing[1]} can't be found, so torch_npu can't be imported", f"{_SET_ENV}, or install CANN"
        )
    elif "undefined symbol" in str(error):
        yield ok(TORCH_NPU, sources.version(TORCH_NPU))
        yield failed(CANN, first_line(error), f"install the CANN that this torch_npu is made for, and {_SET_ENV}")
    else:
        yield failed(TORCH_NPU, f"can't be imported: {first_line(error)}", f"{_SET_ENV}; else install torch_npu anew")
        yield warning(CANN, "not checked without torch_npu")


def _library(npu_version: str) -> Finding:
    """Whether the library that reads events is within reach and has all that is called."""
    try:
        library = ctypes.CDLL(_LIBRARY)
    except OSError as error:
        return failed(CANN, first_line(error), _SET_ENV)
    place = next((line.split()[-1] for line in _maps() if line.endswith(f"/{_LIBRARY}")), _LIBRARY)
    missing = [name for name in _SYMBOLS if not hasattr(library, name)]
    if missing:
        return failed(
            CANN,
            f"{place} has no {', '.join(missing)}: stages would have the host's times only",
            f"install the CANN that torch_npu {npu_version} is made for, and {_SET_ENV}",
        )
    return ok(CANN, place)


def _other(torch: Any, kind: str) -> Iterator[Finding]:
    """The checks of torch's other accelerators."""
    accelerator = getattr(torch, "accelerator", None)
    current = accelerator.current_accelerator() if accelerator is not None else None
    if accelerator is None or current is None or not accelerator.is_available():
        if kind == "auto":
            yield from _skip(CHECKS[3:], not_applicable, "no accelerator here: the host's clock measures the stages")
        else:
            cure = "set OTEL_NPU_DEVICE=auto, or to a device that torch has here"
            yield failed(DEVICES, f"torch has no {kind!r} here", cure)
            yield from _skip((EVENTS, CLOCK), warning, "not checked without a device")
        return
    if kind not in ("auto", current.type):
        yield failed(DEVICES, f"torch has {current.type!r} here, not {kind!r}", f"set OTEL_NPU_DEVICE={current.type}")
        yield from _skip((EVENTS, CLOCK), warning, "not checked without a device")
        return
    yield ok(DEVICES, f"{accelerator.device_count()} x {current.type}")
    yield from _measurements(lambda: accelerator.set_device_index(0), current.type)


def _measurements(set_device: Any, kind: str) -> Iterator[Finding]:
    """Events and clock of the first device."""
    cure = (
        "see whether npu-smi info calls the device healthy and whether somebody else holds it" if kind == "npu" else ""
    )
    try:
        set_device()
        device = devices.find(kind)
        assert device is not None, "torch did not initialise the device"
        yield _timed_pair(device)
    except Exception as error:
        yield failed(EVENTS, first_line(error), cure)
        yield warning(CLOCK, f"not checked without {EVENTS}")
        return
    try:
        yield _clock(device)
    except Exception as error:
        yield failed(CLOCK, first_line(error), cure)


def _timed_pair(device: Device) -> Finding:
    """Record two events and have them resolved both ways."""
    pair = Pool(device, 0).grow()
    assert isinstance(pair, Pair)
    stream = device.current_stream()
    pair.record_start(stream)
    pair.record_end(stream)
    deadline = time.monotonic() + _EVENT_SECONDS
    while not pair.end.query():
        if time.monotonic() > deadline:
            cure = "the device is busy, or hangs: see npu-smi info"
            return failed(EVENTS, f"two events were not done within {_EVENT_SECONDS:.0f} s", cure)
        time.sleep(0.001)
    theirs_ns = float(pair.start.elapsed_time(pair.end)) * 1e6
    [(_, ours_ns)] = device.read(0, [pair])
    if abs(theirs_ns - ours_ns) > _DISAGREEMENT_NS or ours_ns < 0:
        found = f"torch says {theirs_ns / 1000:.1f} us, the {CANN} {ours_ns / 1000:.1f} us"
        return failed(EVENTS, found, "install the CANN that this torch_npu is made for")
    return ok(EVENTS, f"two on {device.kind}:0, {ours_ns / 1000:.1f} us apart by torch and by raw handle")


def _clock(device: Device) -> Finding:
    """How well the device's clock can be placed on the host's, from a moment's pings."""
    from otel_npu.relay.clock import DeviceClock

    clock = DeviceClock(device.resolution_ns)
    last = None
    answered = 0
    for _ in range(_PINGS):
        ping = device.ping(0, _PING_BUDGET_NS)
        if ping is not None:
            answered += 1
            last = ping
            clock.lower(ping.device_ns, ping.before_ns)
            clock.upper(ping.device_ns, ping.seen_ns)
        time.sleep(_PING_PAUSE_SECONDS)
    place = clock.at(last.device_ns) if last is not None else None
    if place is None:
        found = f"none of {_PINGS} pings was answered within {_PING_BUDGET_NS // 1000} us"
        return warning(CLOCK, f"{found}: spans are placed less exactly", "run it again while the device is idle")
    return ok(CLOCK, f"known to +-{place.uncertainty_ns / 1000:.1f} us, {answered} of {_PINGS} pings answered")


def _skip(names: tuple[str, ...], status: Any, why: str) -> Iterator[Finding]:
    return (status(name, why) for name in names)


def _minor(version: str) -> list[str]:
    return re.findall(r"\d+", version)[:2]


def _versions() -> str:
    named = {"driver": host.driver_version(), "CANN": host.cann_version()}
    words = [f"{name} {version}" for name, version in named.items() if version]
    return f", {', '.join(words)}" if words else ""


def _in_a_container() -> str:
    return f"a container needs {_NODES}"


def _maps() -> list[str]:
    try:
        return Path("/proc/self/maps").read_text(errors="replace").splitlines()
    except OSError:
        return []
