"""vLLM's real server with a tiny model on the CPU, as a process tree of its own, and vLLM in one process."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import signal
import socket
import subprocess
import sys
import textwrap
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from tests.helpers import REPOSITORY
from tests.helpers.tiny_model import tiny_model
from tests.helpers.traced import eventually, processes, relays

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

START_SECONDS = 600.0
STOP_SECONDS = 120.0

# The smallest cache that holds a few long requests, and steps of few tokens: so that prompts come in chunks, and
# requests push each other out.
SMALL = ("--kv-cache-memory-bytes", str(512 << 10), "--block-size", "32", "--max-num-batched-tokens", "64")
ROOMY = ("--kv-cache-memory-bytes", str(64 << 20))

# transformers imports torch_npu where it is installed, which fails without an Ascend runtime.
WITHOUT_TORCH_NPU = 'import sys\nsys.modules["torch_npu"] = None\n'

# Model runner V2 needs Triton, whose interpreter runs its kernels on the CPU. It lies apart, because torch and vLLM do
# other things where it is installed. vLLM looks for a backend of that name, of which nothing is used then.
TRITON: Final = Path(sys.prefix) / "triton"
INTERPRETED = f"""
import types
sys.path.append({str(TRITON)!r})
import triton.backends
driver = types.SimpleNamespace(is_active=lambda: False)
triton.backends.backends["cpu"] = types.SimpleNamespace(driver=driver, compiler=None)
"""
V2: Final = {"VLLM_USE_V2_MODEL_RUNNER": "1", "TRITON_INTERPRET": "1", "TORCHDYNAMO_DISABLE": "1"}

needs_v2 = pytest.mark.skipif(not TRITON.is_dir(), reason="Triton is not installed: `make test` installs it with vLLM")
needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None,
    reason="vLLM is not installed: `make test` installs it on x86-64 with Python 3.11, "
    f"this is {platform.machine()} with Python {sys.version_info.major}.{sys.version_info.minor}",
)


def vllm_environment(folder: Path, plugins: Mapping[str, str] | None = None, *, v2: bool = False) -> dict[str, str]:
    """The environment of a test's vLLM, offline and with all that is its own in the folder.

    Args:
        folder: Where its relay's socket and what Python loads first in each of its processes lie.
        plugins: vLLM plugins of the test's own, by name: "module:function".
        v2: Whether it uses model runner V2.
    """
    run, site = folder / "run", folder / "site"
    run.mkdir(parents=True, exist_ok=True)
    site.mkdir(exist_ok=True)
    (site / "sitecustomize.py").write_text(WITHOUT_TORCH_NPU + (INTERPRETED if v2 else ""))
    information = site / "vllm_tests-0.dist-info"
    information.mkdir(exist_ok=True)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-tests\nVersion: 0\n")
    entries = [f"{name} = {target}" for name, target in (plugins or {}).items()]
    (information / "entry_points.txt").write_text("\n".join(["[vllm.general_plugins]", *entries, ""]))
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("OTEL_", "VLLM_"))}
    return {
        **inherited,
        "PYTHONPATH": f"{site}:{REPOSITORY}",
        "XDG_RUNTIME_DIR": str(run),
        "VLLM_CACHE_ROOT": str(REPOSITORY / ".cache" / "vllm"),
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        "OTEL_BSP_SCHEDULE_DELAY": "200",
        # The receiver shares its process with the clients: a batch that it answers too late comes twice.
        "OTEL_BSP_MAX_QUEUE_SIZE": "65536",
        "OTEL_EXPORTER_OTLP_TIMEOUT": "120",
        "OTEL_BSP_EXPORT_TIMEOUT": "120000",
        "OTEL_NPU_ENABLED": "1",
        "OTEL_NPU_DEVICE": "cpu",
        **(V2 if v2 else {}),
    }


class Server:
    """A running server.

    Args:
        folder: Empty, for what is its own; a path short enough for a socket.
        arguments: What its command line holds beside the usual.
        environment: What its environment holds beside the usual; None removes.
        plugins: As in `vllm_environment`.
        v2: As there.
    """

    def __init__(
        self,
        folder: Path,
        arguments: Sequence[str] = (),
        environment: Mapping[str, str | None] | None = None,
        plugins: Mapping[str, str] | None = None,
        *,
        v2: bool = False,
    ) -> None:
        self.folder = folder
        self.port = free_port()
        given = {**vllm_environment(folder, plugins, v2=v2), **(environment or {})}
        self._environment = {name: value for name, value in given.items() if value is not None}
        self._arguments = arguments
        self._log = folder / "log"

    def __enter__(self) -> Server:
        self.start()
        try:
            self.wait_until_ready()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.stop()
        finally:
            self.kill()
            for pid in self.relays():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def start(self) -> None:
        """Start it, without waiting."""
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*self.command(), *self._arguments],
                env=self._environment,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def command(self) -> list[str]:
        """What starts it."""
        command = [sys.executable, "-W", "ignore", "-m", "vllm.entrypoints.openai.api_server"]
        return [*command, "--model", str(tiny_model()), *self.usual_arguments()]

    def usual_arguments(self) -> list[str]:
        """What is small and quick enough for a test."""
        usual = ["--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(self.port)]
        return [*usual, "--max-model-len", "512", "--enforce-eager", "--shutdown-timeout", "10"]

    def wait_until_ready(self) -> None:
        """Wait until it answers.

        Raises:
            AssertionError: It ended, or takes too long; the text has its log's end.
        """
        deadline = time.monotonic() + START_SECONDS
        while not self.healthy():
            code = self._process.poll()
            ended = code is not None or time.monotonic() > deadline
            assert not ended, f"the server did not start, exit code {code}:\n{self.log[-8000:]}"
            time.sleep(0.1)

    def healthy(self) -> bool:
        """Whether it answers."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    @property
    def log(self) -> str:
        """What its processes have written so far."""
        return self._log.read_text(errors="replace")

    def processes(self) -> list[int]:
        """Its processes, without the relay."""
        relays = self.relays()
        return [pid for pid in processes() if pid not in relays and _in_session(pid, self._process.pid)]

    def relays(self) -> list[int]:
        """The relays that it has started."""
        return relays(self.folder / "run")

    def stop(self) -> None:
        """End it orderly, and wait until its relay has sent all that it holds and ended too."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        self._process.wait(STOP_SECONDS)
        eventually(lambda: not self.processes(), "the server's processes have ended", STOP_SECONDS)
        eventually(lambda: not self.relays(), "the relay has ended", STOP_SECONDS)

    def kill(self) -> None:
        """SIGKILL for all its processes but the relay, at once."""
        while pids := self.processes():
            for number in (signal.SIGSTOP, signal.SIGKILL):  # so that none sees another die
                for pid in pids:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, number)
            self._process.wait(STOP_SECONDS)
            time.sleep(0.01)


def run_in_one_process(
    folder: Path,
    source: str,
    environment: Mapping[str, str] | None = None,
    seconds: float = START_SECONDS,
    *,
    v2: bool = False,
) -> str:
    """Run a program that uses vLLM's `LLM` with all of the engine in its own process; gives what it writes.

    The program finds the model's folder in `MODEL` and `llm(**arguments)`, which makes the `LLM`.
    """
    given = {**vllm_environment(folder, v2=v2), "VLLM_ENABLE_V1_MULTIPROCESSING": "0", **(environment or {})}
    path = folder / "program.py"
    path.write_text(_PROLOGUE.format(model=str(tiny_model())) + textwrap.dedent(source))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(path)],
        env=given,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout[-8000:]}"
    eventually(lambda: not relays(folder / "run"), "the relay has ended", STOP_SECONDS)
    return done.stdout


_PROLOGUE = """
MODEL = {model!r}

def llm(**arguments):
    from vllm import LLM
    return LLM(MODEL, enforce_eager=True, max_model_len=512, kv_cache_memory_bytes=64 << 20, **arguments)

"""


def free_port() -> int:
    """A port of the loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _in_session(pid: int, session: int) -> bool:
    """Whether it lives (a zombie doesn't) and belongs to this session."""
    try:
        state, _, _, its_session = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:4]
    except OSError:
        return False  # it has gone
    return state != "Z" and int(its_session) == session
