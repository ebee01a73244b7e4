"""Makes the pictures of `otel-npu top` and of a report, from a run of the real vLLM server under load.

    python -m docs.pictures_of_looking    # docs/pictures/top.svg and docs/pictures/report.png

In the place of a device each forward sleeps, as in `benchmarks.vllm_cost`. It takes what `make setup` installs, and
chromium.
"""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from rich.console import Console
from rich.text import Text

from docs.pictures import FOLDER, read_terminal

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_COLUMNS: Final = 108
_WIDTH, _HEIGHT, _SCALE = 1240, 900, 1.5
_STEP_MS: Final = 10  # of a device that the server has not
_CLIENTS: Final = 4
_WARM_SECONDS: Final = 12.0  # the figures of `top` are of ten
_RECORD_SECONDS: Final = 5


def main() -> None:
    """Run the server, look at it, and draw."""
    from benchmarks.vllm_timed_steps import DEVICE_MS
    from benchmarks.vllm_timed_steps import FOLDER as FOLDER_OF_TOTALS
    from tests.helpers.receiver import Receiver
    from tests.helpers.tiny_model import words
    from tests.helpers.vllm_client import Caller, Client
    from tests.helpers.vllm_server import SMALL, Server

    with tempfile.TemporaryDirectory() as folder, Receiver() as receiver:
        arguments = [*SMALL, "--otlp-traces-endpoint", f"http://127.0.0.1:{receiver.grpc_port}"]
        session = {"OTEL_NPU_SESSION": "vllm"}
        environment = {**session, "OTEL_SERVICE_NAME": "vllm", FOLDER_OF_TOTALS: folder, DEVICE_MS: str(_STEP_MS)}
        plugins = {"timed_steps": "benchmarks.vllm_timed_steps:register"}
        with Server(Path(folder), arguments, environment, plugins) as server:
            client, done = Client(server.port), threading.Event()

            def ask(number: int) -> None:
                while not done.is_set():
                    client.complete(words(30 + 60 * (number % 3)), Caller().headers(), max_tokens=24 + 8 * number)

            threads = [threading.Thread(target=ask, args=(number,)) for number in range(_CLIENTS)]
            for thread in threads:
                thread.start()
            try:
                time.sleep(_WARM_SECONDS)
                look = {"XDG_RUNTIME_DIR": str(Path(folder, "run"))}
                _top(look)
                page = Path(folder, "vllm.html")
                _run("record", "--seconds", str(_RECORD_SECONDS), "-o", str(page), environment=look)
            finally:
                done.set()
                for thread in threads:
                    thread.join()
        _screenshot(page)


def _top(environment: Mapping[str, str]) -> None:
    """One table of `top`, as a terminal shows it."""
    process, descriptor = pty.fork()
    if not process:
        os.environ.update(environment, TERM="xterm-256color", COLUMNS=str(_COLUMNS))
        os.execv(_program(), ["otel-npu", "top", "--once", "--session", "vllm"])  # noqa: S606
    shown = read_terminal(descriptor).decode()
    assert os.waitpid(process, 0)[1] == 0, shown
    console = Console(record=True, width=_COLUMNS, force_terminal=True, file=Path(os.devnull).open("w"))  # noqa: SIM115
    console.print(Text("$ otel-npu top --once", "bold"))
    console.print(Text.from_ansi(shown.replace("\r", "")), end="")
    svg = console.export_svg(title="otel-npu top")
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)  # nothing from the network: any fixed font will do
    (FOLDER / "top.svg").write_text(re.sub(r"terminal-\d+", "terminal", svg))


def _screenshot(page: Path) -> None:
    from PIL import Image

    picture = FOLDER / "report.png"
    with tempfile.TemporaryDirectory() as profile:
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}"]
        size = [f"--window-size={_WIDTH},{_HEIGHT}", f"--force-device-scale-factor={_SCALE}"]
        command = ["chromium", *options, *size, "--virtual-time-budget=30000", f"--screenshot={picture}", page.as_uri()]
        subprocess.run(command, check=True, timeout=300, stderr=subprocess.DEVNULL)  # noqa: S603
    with Image.open(picture) as whole:
        whole.quantize().save(picture, optimize=True)


def _run(*arguments: str, environment: Mapping[str, str]) -> None:
    command = [_program(), *arguments, "--session", "vllm"]
    subprocess.run(command, check=True, timeout=300, env={**os.environ, **environment})  # noqa: S603


_program: Callable[[], str] = Path(sys.executable).with_name("otel-npu").__str__


if __name__ == "__main__":
    main()
