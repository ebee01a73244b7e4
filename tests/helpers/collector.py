"""The real collector `rotel`, on loopback, passing on what it gets."""

from __future__ import annotations

import importlib.util
import socket
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.helpers.receiver import Receiver


class Collector:
    """Takes OTLP over gRPC and HTTP and exports it over gRPC to a receiver, without batching."""

    def __init__(self, receiver: Receiver) -> None:
        spec = importlib.util.find_spec("rotel")
        if spec is None or spec.origin is None:
            pytest.skip("the collector rotel is not installed")
        self.grpc_port, self.http_port = _free_port(), _free_port()
        self._process = subprocess.Popen(
            [
                str(Path(spec.origin).with_name("rotel-agent")),
                "start",
                *("--otlp-grpc-endpoint", f"127.0.0.1:{self.grpc_port}"),
                *("--otlp-http-endpoint", f"127.0.0.1:{self.http_port}"),
                *("--exporter", "otlp", "--otlp-exporter-protocol", "grpc"),
                *("--otlp-exporter-endpoint", f"http://127.0.0.1:{receiver.grpc_port}"),
                "--disable-batching",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for port in (self.grpc_port, self.http_port):
            _wait_for(port)

    def __enter__(self) -> Collector:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()

    @property
    def grpc_environment(self) -> dict[str, str]:
        """What sends spans here over gRPC."""
        return {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{self.grpc_port}",
            "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc",
        }

    @property
    def http_environment(self) -> dict[str, str]:
        """What sends spans here over HTTP."""
        return {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{self.http_port}",
            "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
        }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for(port: int) -> None:
    deadline = time.monotonic() + 120
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            assert time.monotonic() < deadline, "the collector did not start"
            time.sleep(0.02)
        else:
            return
