"""What the tests share: a clean environment, an OTLP receiver, programs of their own, and the simulated Ascend."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest

# Where torch_npu is installed, importing torch without an Ascend runtime fails; who wants both loads both.
os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"

from tests.helpers import REPOSITORY
from tests.helpers.quick import (  # noqa: F401  hooks of pytest
    pytest_collection_modifyitems,
    pytest_runtest_protocol,
    pytest_sessionfinish,
    pytest_terminal_summary,
    pytest_testnodedown,
)
from tests.helpers.receiver import Receiver

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from tests.helpers.ascend.simulator import Simulator
    from tests.helpers.capturing import Captured, Exported

# How long an example takes is the machine's business.
hypothesis.settings.register_profile("anywhere", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("anywhere")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No setting from outside, and sockets in a folder of the test's own, short enough for a socket's path."""
    for variable in list(os.environ):
        if variable.startswith(("OTEL_", "VLLM_")):
            monkeypatch.delenv(variable)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path_factory.mktemp("run")))
    yield
    if "otel_npu.capture.switch" in sys.modules:
        import otel_npu

        otel_npu.disable()
    os.environ.pop("OTEL_NPU_SESSION", None)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    """An OTLP receiver; nothing is sent to it unless the environment says so."""
    with Receiver() as running:
        yield running


@pytest.fixture
def undecided(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has used nothing yet: the environment is still to be read."""
    from otel_npu.capture import switch

    monkeypatch.setattr(switch, "_decided", False)
    switch._off_stages.clear()


@pytest.fixture
def no_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process in which no hook was installed; what the test installs ends with it."""
    from otel_npu import hooks

    monkeypatch.setattr(hooks, "_finder", hooks._Finder())
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))


@pytest.fixture
def captured() -> Iterator[Captured]:
    """Tracing on a simulated NPU with a clock of the test's own; what is captured is seen as frames."""
    from tests.helpers.capturing import capturing

    with capturing() as tracing:
        yield tracing


@pytest.fixture
def exported(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> Exported:
    """The same, with the relay on a thread and its spans sent to the receiver."""
    from otel_npu.capture import switch
    from tests.helpers.capturing import Clock, Exported, chosen, simulated

    for variable, value in receiver.grpc_environment.items():
        monkeypatch.setenv(variable, value)
    clock = Clock()
    tracing = Exported(simulated(clock), clock, receiver)
    switch.enable_on(tracing.device, chosen())
    return tracing


@pytest.fixture
def run_program(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a program in a process of its own, in this environment and what is added to it."""

    def run(
        source: str, environment: Mapping[str, str] | None = None, *, timeout: float = 300, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        process = subprocess.Popen(
            program(tmp_path, source),
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONFAULTHANDLER": "1", **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            output = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGABRT)  # it says what each of its threads is about
            output = process.communicate()
            raise AssertionError(f"still there after {timeout:.0f} s\n{output[0]}\n{output[1]}") from None
        except BaseException:
            process.kill()
            raise
        done = subprocess.CompletedProcess(process.args, process.returncode, *output)
        assert not check or done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return run


def program(folder: Path, source: str) -> list[str]:
    """The command that runs this source as a program."""
    path = folder / f"program_{len(list(folder.glob('program_*')))}.py"
    path.write_text(textwrap.dedent(source))
    return [sys.executable, str(path)]


@pytest.fixture(scope="session")
def loaded_ascend() -> Simulator:
    """The real torch_npu on the simulated runtime, loaded into this process."""
    from tests.helpers.ascend.build import BuildError
    from tests.helpers.ascend.simulator import Simulator

    try:
        simulator = Simulator.load()
    except BuildError as error:
        pytest.skip(str(error))
    import torch
    import torch_npu  # noqa: F401

    torch.npu.set_device(0)
    torch.npu._sleep(1)  # the first operator of a process waits for its own launch; later ones don't
    return simulator


@pytest.fixture
def ascend(loaded_ascend: Simulator) -> Iterator[Simulator]:
    """The simulated runtime, as it was again after the test."""
    import torch

    yield loaded_ascend
    loaded_ascend.defaults()
    torch.npu.synchronize()


@pytest.fixture
def torch_npu(ascend: Simulator) -> Any:
    """torch, with the NPU behind it."""
    import torch

    return torch
