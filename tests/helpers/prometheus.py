"""The real Prometheus, on loopback, scraping a relay every second."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pathlib import Path

PATIENCE_SECONDS = 60.0


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Prometheus:
    """Scrapes `127.0.0.1:port` as the job `relay`, and keeps exemplars.

    Args:
        folder: Where its files lie.
        port: What it scrapes.
        rules: A file of alerting rules.
    """

    def __init__(self, folder: Path, port: int, rules: Path | None = None) -> None:
        command = shutil.which("prometheus")
        if command is None:
            pytest.skip("prometheus is not installed (Debian's package of that name)")
        configuration = {
            "global": {"scrape_interval": "1s", "scrape_timeout": "900ms", "evaluation_interval": "1s"},
            "rule_files": [] if rules is None else [str(rules)],
            "scrape_configs": [{"job_name": "relay", "static_configs": [{"targets": [f"127.0.0.1:{port}"]}]}],
        }
        (folder / "prometheus.json").write_text(json.dumps(configuration))  # YAML too
        self._port = free_port()
        self._process = subprocess.Popen(
            [
                command,
                f"--config.file={folder / 'prometheus.json'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{self._port}",
                "--enable-feature=exemplar-storage",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def __enter__(self) -> Prometheus:
        self.eventually(lambda: self.query("up"), "Prometheus scrapes")
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def query(self, expression: str) -> list[dict[str, Any]]:
        """What an instant query gives: of each series its labels (`metric`) and its `value`, a time and a text."""
        return list(self._get("query", query=expression)["result"])

    def value(self, expression: str) -> float:
        """The value of the only series; 0 if there is none."""
        found = self.query(expression)
        return float(found[0]["value"][1]) if found else 0.0

    def exemplars(self, selector: str) -> list[dict[str, Any]]:
        """All exemplars of the last hour: `labels`, `value`, `timestamp`."""
        now = time.time()
        told = self._get("query_exemplars", query=selector, start=now - 3600, end=now + 60)
        return [exemplar for series in told for exemplar in series["exemplars"]]

    def alerts(self) -> list[dict[str, Any]]:
        """The rules that are pending or firing."""
        return list(self._get("alerts")["alerts"])

    def eventually(self, question: Any, what: str) -> Any:
        """The first answer that is true."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                answer = question()
            except OSError:  # it has only just been started
                answer = None
            if answer:
                return answer
            assert time.monotonic() < deadline, what
            time.sleep(0.2)

    def _get(self, path: str, **parameters: Any) -> Any:
        url = f"http://127.0.0.1:{self._port}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=10) as response:
            return json.load(response)["data"]
