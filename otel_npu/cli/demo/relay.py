"""The demo's relay: the product's own, with one exporter more, which brings the spans back to the demo.

The demo has to draw what the endpoint gets, and only the standard exporters know all the ways to reach one (gRPC or
HTTP, TLS, headers, proxies). So nothing stands between them and the endpoint: the relay gives every span to both.
"""

from __future__ import annotations

import argparse
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

from otel_npu.settings import SESSION
from otel_npu.wire import rendezvous
from otel_npu.wire.start import APART

if TYPE_CHECKING:
    from types import TracebackType

_log = logging.getLogger("otel_npu.relay")

_DRAIN_SECONDS: Final = 31.0
"""The relay gives up before that."""
_LOG_BYTES: Final = 1 << 16
_AT_THE_END_MS: Final = "86400000"


class DemoRelay:
    """Runs the relay's process while it is open.

    Args:
        picture_url: Where the demo receives.
        standard: Whether spans also go where the standard variables say.

    Raises:
        OSError: The socket can't be made or the process can't be started.
    """

    def __init__(self, picture_url: str, *, standard: bool) -> None:
        # Not the session of the environment: another relay may serve that, and would not draw.
        os.environ[SESSION] = secrets.token_hex(8)
        path = self._path = rendezvous.socket_path(rendezvous.session_id())
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  closed with the relay
        with rendezvous.session_lock(path), rendezvous.listen(path) as listener:
            arguments = ["--listener", str(listener.fileno()), "--socket", str(path), "--picture", picture_url]
            self._process = subprocess.Popen(  # noqa: S603
                [sys.executable, "-m", __name__, *arguments, *(["--standard"] if standard else [])],
                pass_fds=[listener.fileno()],
                stdin=subprocess.DEVNULL,
                stderr=self._log,
                env={**os.environ, "PYTHONSAFEPATH": "1"},
                **APART,
            )

    def __enter__(self) -> DemoRelay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Wait for its end, which comes when the demo has let go of it."""
        with self._log:
            try:
                self._process.wait(_DRAIN_SECONDS)
            except subprocess.TimeoutExpired:
                self.kill()
        rendezvous.withdraw(self._path)  # if it has not done so: it may have been killed, or never have run

    def kill(self) -> None:
        """End it now: what it holds, nobody takes."""
        self._process.kill()
        self._process.wait()

    @property
    def ended(self) -> bool:
        """Whether it has ended, which it does not by itself while the demo runs."""
        return self._process.poll() is not None

    def last_words(self) -> str:
        """The last line that it logged, which says why spans were not taken."""
        # Not by seek(): the position is the child's too.
        text = os.pread(self._log.fileno(), _LOG_BYTES, 0).decode(errors="replace")
        return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def main() -> int:
    """Run the relay; returns the process's exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--listener", type=int, required=True)
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--picture", required=True)
    parser.add_argument("--standard", action="store_true")
    arguments = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    from otel_npu.cli.demo.receiver import exporter_to
    from otel_npu.relay.exporters import exporters_from_environment
    from otel_npu.relay.metrics.counted import Metrics
    from otel_npu.relay.server import Server

    try:
        standard = exporters_from_environment() if arguments.standard else []
    except Exception as error:
        _log.error("%s", error)
        return 1
    # At its end: what a receiver of traces alone says of metrics is no reason to give up.
    os.environ.setdefault("OTEL_METRIC_EXPORT_INTERVAL", _AT_THE_END_MS)
    exporters = [exporter_to(arguments.picture), *standard]
    listener = socket.socket(fileno=arguments.listener)
    server = (
        Server(exporters, [listener], metrics=Metrics.from_environment)
        if arguments.standard
        else Server(exporters, [listener])
    )
    signal.signal(signal.SIGTERM, lambda *_: server.stop())
    server.run(leave=lambda: rendezvous.withdraw(arguments.socket))
    return 0


if __name__ == "__main__":
    sys.exit(main())
