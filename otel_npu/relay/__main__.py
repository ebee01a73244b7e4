"""`python -m otel_npu.relay`: the relay as a process."""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import logging
import os
import resource
import select
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from otel_npu.relay.server import MAX_DRAIN_SECONDS, Server
from otel_npu.secrets import MaskingFormatter
from otel_npu.wire import rendezvous
from otel_npu.wire.start import SERVING

if TYPE_CHECKING:
    from collections.abc import Sequence

_log = logging.getLogger("otel_npu.relay")

_LOOK_AGAIN_SECONDS: Final = 1.0
_DESCRIPTORS: Final = 4096
_OBJECTS_BETWEEN_COLLECTIONS: Final = 10_000


class Life:
    """What a relay that was started by a traced process has of it: a pipe whose other end that process holds.

    Args:
        descriptor: The writing end; None for a relay that nobody waits for.
    """

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor

    def begin(self) -> None:
        """Become nobody's child, in a process group of its own, and say who this is.

        Not in a session of its own: to each session Linux gives a share of the processors (autogroup), and this is to
        take part in the program's. Between shares a busy one could keep another waiting for half a minute.
        """
        if self._descriptor is None:
            return
        if os.fork():
            os._exit(0)
        os.setpgid(0, 0)
        self.say(b"%d\n" % os.getpid())

    def say(self, words: bytes) -> None:
        """Tell whoever started this, if it is still there."""
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                os.write(self._descriptor, words)

    def let_go_of_output(self, spans: int) -> None:
        """Let go of the server's stdout and stderr once it has ended: who reads them to their end waits for that.

        Unless spans are to go there. So many spans still wait.
        """
        if self._descriptor is None or _writes_to_console():
            return
        poll = select.poll()
        poll.register(self._descriptor, 0)
        if not poll.poll(0):  # somebody waits for this relay's end, and is there
            return
        _log.warning(
            "the traced program has ended, and %d spans still wait for the endpoint: they do for %.0f s at most, "
            "and what becomes of them is said nowhere",
            spans,
            MAX_DRAIN_SECONDS,
        )
        logging.disable()
        self._descriptor = None
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, AttributeError, ValueError):  # closed from the start
                os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def _writes_to_console() -> bool:
    variables = ("OTEL_TRACES_EXPORTER", "OTEL_METRICS_EXPORTER")
    return any("console" in os.environ.get(variable, "") for variable in variables)


def serve(listeners: Sequence[socket.socket], path: Path | None, life: Life, *, stay: bool) -> None:
    """Serve on these sockets until the last client has gone or, with `stay`, until SIGTERM."""
    _take_descriptors()
    # Ctrl-C in the terminal is for the model; the relay ends after it, when it has sent everything.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    server = Server.from_environment(listeners, stay=stay, loaded=_settle_down)
    signal.signal(signal.SIGTERM, lambda *_: server.stop())
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    life.say(SERVING)
    server.run(leave=functools.partial(_leave, path), exporting=life.let_go_of_output)


def _settle_down() -> None:
    """Look for cycles where there may be some: not in the SDK, which stays, nor whenever a few frames have come."""
    gc.freeze()
    gc.set_threshold(_OBJECTS_BETWEEN_COLLECTIONS)


def _take_descriptors() -> None:
    """Room for as many connections as are taken: the usual limit is less."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _DESCRIPTORS)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _leave(path: Path | None) -> None:
    if path is not None:
        rendezvous.withdraw(path)


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
    parser.add_argument("--listener", type=int, action="append", help="descriptor of a listening socket")
    parser.add_argument("--socket", type=Path, help="the socket's path; from the session without it")
    parser.add_argument("--life", type=int, help="descriptor of a pipe to whoever started this")
    parser.add_argument("--wait", action="store_true", help="wait for the end of a relay that serves it already")
    arguments = parser.parse_args()
    life = Life(arguments.life)
    life.begin()
    try:
        if arguments.listener:
            listeners = [socket.socket(fileno=descriptor) for descriptor in arguments.listener]
            serve(listeners, arguments.socket, life, stay=False)
        else:
            path = arguments.socket or rendezvous.socket_path(rendezvous.session_id())
            serve([claim(path, wait=arguments.wait)], path, life, stay=True)
    except (OSError, ImportError) as error:
        _log.error("the relay can't run: %s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
