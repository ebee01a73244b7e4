"""`python -m otel_npu.relay`: the relay as a process."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Final

from otel_npu.relay.server import Server
from otel_npu.secrets import MaskingFormatter
from otel_npu.wire import rendezvous

_log = logging.getLogger("otel_npu.relay")

_LOOK_AGAIN_SECONDS: Final = 1.0


def serve(listener: socket.socket, path: Path, *, stay: bool) -> None:
    """Serve on this socket until the last client has gone or, with `stay`, until SIGTERM."""
    # Ctrl-C in the terminal is for the model; the relay ends after it, when it has sent everything.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    server = Server.from_environment(listener, stay=stay)
    signal.signal(signal.SIGTERM, lambda *_: server.stop())
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    server.run(leave=lambda: rendezvous.withdraw(path))


def claim(path: Path, *, wait: bool) -> socket.socket:
    """A listening socket at this path.

    Args:
        path: The session's socket.
        wait: Whether to wait for the end of a relay that serves it already.

    Raises:
        RendezvousError: Another relay serves it, and is not to be waited for.
    """
    waits = False
    while True:
        with rendezvous.session_lock(path):
            other = rendezvous.connect(path)
            if other is None:
                return rendezvous.listen(path)
            other.close()  # to listen there too would take its name away from it
        if not wait:
            raise rendezvous.RendezvousError(f"a relay serves {path} already")
        if not waits:
            waits = True
            _log.warning("a relay serves %s already; waiting for its end", path)
        # There is nothing to drain.
        if signal.sigtimedwait({signal.SIGTERM}, _LOOK_AGAIN_SECONDS) is not None:
            sys.exit(0)


def main() -> int:
    """Run the relay; returns the process's exit code."""
    # Until it is handled it is to wait: to the first process of a container it would otherwise be lost.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    handler = logging.StreamHandler()
    handler.setFormatter(MaskingFormatter("%(levelname)s %(asctime)s [%(name)s] %(message)s"))
    logging.basicConfig(handlers=[handler])
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # what its C core has to say, its errors say too
    parser = argparse.ArgumentParser(prog="python -m otel_npu.relay", description=__doc__)
    parser.add_argument("--listener", type=int, help="descriptor of a listening socket")
    parser.add_argument("--socket", type=Path, help="the socket's path; from the session without it")
    parser.add_argument("--wait", action="store_true", help="wait for the end of a relay that serves it already")
    arguments = parser.parse_args()
    try:
        path = arguments.socket or rendezvous.socket_path(rendezvous.session_id())
        if arguments.listener is not None:
            serve(socket.socket(fileno=arguments.listener), path, stay=False)
        else:
            serve(claim(path, wait=arguments.wait), path, stay=True)
    except OSError as error:
        _log.error("the relay can't run: %s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
