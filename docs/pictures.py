"""Makes the pictures of the README from real runs.

    python -m docs.pictures demo                                  # docs/pictures/demo.svg
    python -m docs.pictures run request.json                      # a request to the real vLLM server, as it arrived
    python -m docs.pictures draw request.json --jaeger-ui FOLDER  # docs/pictures/*.png, by Jaeger's own page

The folder is what `vite build` makes of Jaeger's page (github.com/jaegertracing/jaeger-ui, packages/jaeger-ui/build).
Drawing takes chromium; running the server takes what `make setup` installs.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import json
import os
import pty
import re
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rich.console import Console
from rich.text import Text

from otel_npu import semconv

if TYPE_CHECKING:
    from collections.abc import Iterable

FOLDER: Final = Path(__file__).with_name("pictures")
_COLUMNS, _ROWS = 96, 24
_WIDTH, _HEADER, _ROW = 1240, 92, 28  # of Jaeger's page, in pixels
_SCALE, _LEAST_HEIGHT = 1.5, 500
_STEP_MS: Final = 10  # of a device that the picture's server has not
_LLM_REQUEST: Final = "llm_request"
_CONFIG: Final = {"criticalPathEnabled": False}


def demo() -> None:
    """The demo as a terminal shows it, in colour."""
    process, descriptor = pty.fork()
    if not process:
        os.environ.update(TERM="xterm-256color", COLUMNS=str(_COLUMNS), LINES=str(_ROWS))
        program = Path(sys.executable).with_name("otel-npu")
        os.execve(program, ["otel-npu", "demo"], {**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}"})  # noqa: S606
    shown = read_terminal(descriptor).decode()
    assert os.waitpid(process, 0)[1] == 0, shown
    shown = shown.rpartition("\x1b[2K")[2].replace("\r", "")  # what stays when the progress is over
    console = Console(record=True, width=_COLUMNS, force_terminal=True, file=Path(os.devnull).open("w"))  # noqa: SIM115
    console.print(Text("$ otel-npu demo", "bold"))
    console.print(Text.from_ansi(shown), end="")
    svg = console.export_svg(title="otel-npu demo")
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)  # nothing from the network: any fixed font will do
    (FOLDER / "demo.svg").write_text(re.sub(r"terminal-\d+", "terminal", svg))


def run(file: Path) -> None:
    """Ask the real server for several completions at once, and keep the trace of one.

    In the place of a device each forward sleeps, as in `benchmarks.vllm_cost`.
    """
    from benchmarks.vllm_timed_steps import DEVICE_MS
    from benchmarks.vllm_timed_steps import FOLDER as FOLDER_OF_TOTALS
    from tests.helpers.receiver import Receiver
    from tests.helpers.tiny_model import words
    from tests.helpers.vllm_client import Caller, Client
    from tests.helpers.vllm_server import SMALL, Server
    from tests.helpers.vllm_spans import requests_of

    with tempfile.TemporaryDirectory() as folder, Receiver() as receiver:
        endpoint = f"http://127.0.0.1:{receiver.grpc_port}"
        arguments = [*SMALL, "--otlp-traces-endpoint", endpoint]
        environment = {"OTEL_SERVICE_NAME": "vllm", FOLDER_OF_TOTALS: folder, DEVICE_MS: str(_STEP_MS)}
        plugins = {"timed_steps": "benchmarks.vllm_timed_steps:register"}
        with Server(Path(folder), arguments, environment, plugins) as server:
            client = Client(server.port)
            client.complete(words(100), max_tokens=8)  # what is done for the first time takes long

            def ask(number: int) -> str:
                caller = Caller()
                client.complete(words(30 + 60 * (number % 3)), caller.headers(), max_tokens=24 + 4 * number)
                return caller.trace_id

            with ThreadPoolExecutor(4) as pool:
                asked = list(pool.map(ask, range(8)))
            spans, requests = requests_of(receiver, lambda span: span.trace_id in asked, len(asked))
    chunked = [
        request for request in requests if any(span.name == semconv.PREFILL_STEP for span in spans.descendants(request))
    ]
    request = max(chunked, key=lambda span: span.duration_ns)
    file.write_text(json.dumps([asdict(span) for span in (request, *spans.descendants(request))], indent=1))


def draw(file: Path, jaeger_ui: Path) -> None:
    """The request as vLLM shows it alone, and with otel-npu, both as Jaeger's page draws them."""
    spans = json.loads(file.read_text())
    alone = [span for span in spans if span["name"] == _LLM_REQUEST]
    for name, shown in (("vllm-alone", alone), ("vllm-with-stages", spans)):
        _screenshot(jaeger_ui, _as_jaeger(shown), FOLDER / f"{name}.png", _HEADER + _ROW * len(shown))


def _as_jaeger(spans: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """A trace in the form in which Jaeger's page asks for it."""
    shown = list(spans)
    trace_id = shown[0]["trace_id"]
    processes = {span["resource"]["service.instance.id"]: span["resource"] for span in shown}
    made = [
        {
            "traceID": trace_id,
            "spanID": span["span_id"],
            "operationName": span["name"],
            "references": [
                {"refType": "CHILD_OF", "traceID": trace_id, "spanID": span["parent_span_id"]}
                for parent in shown
                if parent["span_id"] == span["parent_span_id"]
            ],
            "startTime": span["start_ns"] // 1000,
            "duration": (span["end_ns"] - span["start_ns"]) // 1000,
            "tags": [{"key": key, "type": "string", "value": str(value)} for key, value in span["attributes"].items()],
            "logs": [],
            "processID": span["resource"]["service.instance.id"],
        }
        for span in shown
    ]
    described = {key: {"serviceName": resource["service.name"], "tags": []} for key, resource in processes.items()}
    return {"data": [{"traceID": trace_id, "spans": made, "processes": described}]}


def _screenshot(jaeger_ui: Path, trace: dict[str, Any], picture: Path, height: int) -> None:
    from PIL import Image

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(_Page, trace, directory=str(jaeger_ui))
    )
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    trace_id = trace["data"][0]["traceID"]
    embedded = "uiEmbed=v0&uiTimelineCollapseTitle=1&uiTimelineHideMinimap=1&uiTimelineHideSummary=1"
    url = f"http://127.0.0.1:{server.server_port}/trace/{trace_id}?{embedded}"
    with tempfile.TemporaryDirectory() as profile:
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}"]
        window = f"--window-size={_WIDTH},{max(height, _LEAST_HEIGHT)}"
        size = [window, f"--force-device-scale-factor={_SCALE}", "--virtual-time-budget=20000"]
        command = ["chromium", *options, *size, f"--screenshot={picture}", url]
        subprocess.run(command, check=True, timeout=120, stderr=subprocess.DEVNULL)  # noqa: S603
    server.shutdown()
    thread.join()
    with Image.open(picture) as whole:
        whole.crop((0, 0, whole.width, round(height * _SCALE))).quantize().save(picture, optimize=True)


class _Page(http.server.SimpleHTTPRequestHandler):
    """Jaeger's page, with one trace behind it."""

    def __init__(self, trace: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        self._trace = trace
        super().__init__(*args, **kwargs)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/api/"):
            answer = self._trace if path.startswith("/api/traces/") else {"data": []}
            self._send("application/json", json.dumps(answer))
            return
        file = Path(str(self.directory), path.lstrip("/"))
        if file.is_file() and path != "/":
            super().do_GET()
            return
        page = Path(str(self.directory), "index.html").read_text()
        # As Jaeger itself does it; the black lines of the critical path would hide the bars.
        self._send(
            "text/html", page.replace("JAEGER_CONFIG = DEFAULT_CONFIG", f"JAEGER_CONFIG = {json.dumps(_CONFIG)}")
        )

    def _send(self, content_type: str, text: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", content_type)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        """Nothing."""


def read_terminal(descriptor: int) -> bytes:
    """All that is shown on a terminal until nobody writes to it any more."""
    read = b""
    while True:
        try:
            more = os.read(descriptor, 1 << 16)
        except OSError:  # the other end is gone
            return read
        if not more:
            return read
        read += more


def main() -> None:
    """Make what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    commands.add_parser("demo")
    commands.add_parser("run").add_argument("file", type=Path)
    drawing = commands.add_parser("draw")
    drawing.add_argument("file", type=Path)
    drawing.add_argument("--jaeger-ui", type=Path, required=True)
    arguments = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    if arguments.command == "demo":
        demo()
    elif arguments.command == "run":
        run(arguments.file)
    else:
        draw(arguments.file, arguments.jaeger_ui)


if __name__ == "__main__":
    main()
