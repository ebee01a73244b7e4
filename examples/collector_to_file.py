"""Run a program with its spans going through a collector into a file: no server, no browser, something to grep.

The collector is rotel (`pip install rotel`); what it takes in it writes out in full.

    python examples/collector_to_file.py spans.txt -- python examples/torch_loop.py --tokens 20
    grep -A5 forward spans.txt
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def collector(file: Path) -> Iterator[int]:
    """A collector that writes all spans to this file, on the OTLP/gRPC port that is given."""
    spec = importlib.util.find_spec("rotel")
    if spec is None or spec.origin is None:
        sys.exit("the collector is not installed: pip install rotel")
    grpc_port, http_port = free_port(), free_port()
    agent = Path(spec.origin).with_name("rotel-agent")
    command = [str(agent), "start", "--exporter", "blackhole", "--debug-log", "traces"]
    command += ["--debug-log-verbosity", "detailed"]
    command += ["--otlp-grpc-endpoint", f"127.0.0.1:{grpc_port}", "--otlp-http-endpoint", f"127.0.0.1:{http_port}"]
    with file.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, "NO_COLOR": "1"})
        try:
            wait_for(grpc_port)
            yield grpc_port
        finally:
            process.terminate()
            process.wait()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(port: int) -> None:
    """Wait until somebody listens on the port."""
    for _ in range(200):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.05)
    sys.exit("the collector did not start")


def main() -> int:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("program", nargs="+")
    arguments = parser.parse_args()
    with collector(arguments.file) as port:
        environment = {
            "OTEL_NPU_ENABLED": "1",
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}",
            "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc",
        }
        code = subprocess.run(arguments.program, env={**os.environ, **environment}, check=False).returncode
    print(f"the spans are in {arguments.file}")
    return code


if __name__ == "__main__":
    sys.exit(main())
