"""`python -m otel_npu.relay`: the relay as a process."""

from __future__ import annotations

import argparse
import logging
import signal
import socket
import sys
from pathlib import Path

from otel_npu.relay.server import Server
from otel_npu.wire import rendezvous

_log = logging.getLogger("otel_npu.relay")


def serve(listener: socket.socket, path: Path, *, stay: bool) -> None:
    """Serve on this socket until the last client has gone or, with `stay`, until SIGTERM."""
    # Ctrl-C in the terminal is for the model; the relay ends after it, when it has sent everything.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    server = Server.from_environment(listener, stay=stay)
    signal.signal(signal.SIGTERM, lambda *_: server.stop())
    server.run(leave=lambda: rendezvous.withdraw(path))


def main() -> int:
    """Run the relay; returns the process's exit code."""
    logging.basicConfig(format="%(levelname)s %(asctime)s [%(name)s] %(message)s")
    parser = argparse.ArgumentParser(prog="python -m otel_npu.relay", description=__doc__)
    parser.add_argument("--listener", type=int, help="descriptor of a listening socket")
    parser.add_argument("--socket", type=Path, help="the socket's path; from the session without it")
    arguments = parser.parse_args()
    try:
        path = arguments.socket or rendezvous.socket_path(rendezvous.session_id())
        if arguments.listener is not None:
            serve(socket.socket(fileno=arguments.listener), path, stay=False)
        else:
            with rendezvous.session_lock(path):
                other = rendezvous.connect(path)
                if other is not None:  # to listen there too would take its name away from it
                    other.close()
                    raise rendezvous.RendezvousError(f"a relay serves {path} already")
                listener = rendezvous.listen(path)
            serve(listener, path, stay=True)
    except OSError as error:
        _log.error("the relay can't run: %s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
