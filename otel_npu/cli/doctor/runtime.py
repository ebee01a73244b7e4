"""The checks of the relay: the folder of its sockets, and a relay that is started and ends again."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from otel_npu.cli.doctor.findings import Finding, failed, first_line, not_applicable, ok
from otel_npu.cli.doctor.running import OWN
from otel_npu.cli.doctor.settings import wanted_export
from otel_npu.wire import rendezvous

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator

FOLDER: Final = "socket folder"
RELAY: Final = "relay"

_ANSWER_SECONDS: Final = 7.0
_END_SECONDS: Final = 3.0
_LOG_BYTES: Final = 1 << 16


def folder() -> Iterator[Finding]:
    """Whether the folder of the relay's sockets, if it is there, belongs to this user alone."""
    if wanted_export() != "relay":
        yield not_applicable(FOLDER, "not used: OTEL_NPU_EXPORT=inprocess")
        return
    try:
        place = rendezvous.socket_folder()
    except OSError as error:
        yield failed(FOLDER, first_line(error), "set XDG_RUNTIME_DIR to a folder that this user can write to")
        return
    try:
        rendezvous.check_private(place)
    except FileNotFoundError:
        yield ok(FOLDER, f"{place}, to be made by the first process that traces")
    except rendezvous.RendezvousError as error:
        yield failed(
            FOLDER,
            first_line(error),
            f"chmod 700 {place}, if it is yours; else set XDG_RUNTIME_DIR to a folder of this user's own",
        )
    else:
        yield ok(FOLDER, str(place))


def relay() -> Iterator[Finding]:
    """Whether a relay starts, answers and ends. Runs in a process of its own, whose stderr it takes over."""
    if wanted_export() != "relay":
        yield not_applicable(RELAY, "not used: OTEL_NPU_EXPORT=inprocess")
        return
    with tempfile.TemporaryFile() as log:
        os.dup2(log.fileno(), 2)  # the relay inherits it
        began = time.monotonic()
        try:
            _run_one()
        except Exception as error:
            words = os.pread(log.fileno(), _LOG_BYTES, 0).decode(errors="replace").strip().splitlines()
            yield failed(
                RELAY,
                f"can't start: {first_line(error)}" + (f": {first_line(words[-1])}" if words else ""),
                _cure(error),
            )
            return
    yield ok(RELAY, f"starts, answers and ends within {time.monotonic() - began:.1f} s")


def _run_one() -> None:
    """Start a relay in a session of its own, have it answer, see it end.

    Raises:
        OSError, RuntimeError: It can't, and the text says why.
    """
    base = rendezvous.socket_folder().parent
    # Not the folder of the real sockets: a lock file would stay in it.
    with tempfile.TemporaryDirectory(dir=base, prefix=f"{rendezvous.socket_folder().name}-") as place:
        connection, relay, _ = rendezvous.connect_or_start(
            Path(place, "s.sock"), {"OTEL_TRACES_EXPORTER": "none", OWN: "1"}
        )
        assert relay is not None
        try:
            with connection:
                _expect_answer(connection)
            if not relay.wait(_END_SECONDS):
                raise RuntimeError("it does not end when its last client has gone")
        finally:
            if not relay.wait(0) and relay.pid is not None:
                os.kill(relay.pid, signal.SIGKILL)
            relay.close()


def _expect_answer(connection: socket.socket) -> None:
    from otel_npu.wire import frames

    answer = b""
    with contextlib.suppress(ConnectionError):  # it has gone
        connection.send(frames.encode(frames.Flush(1, _ANSWER_SECONDS)))
        if not select.select([connection], [], [], _ANSWER_SECONDS)[0]:
            raise RuntimeError(f"no answer within {_ANSWER_SECONDS:.0f} s")
        answer = connection.recv(frames.MAX_FRAME_BYTES)
    if not answer:
        raise RuntimeError("it ended as soon as it was started")
    if not frames.decode_flushed(answer).complete:
        raise RuntimeError("it could not flush")


def _cure(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno:  # of the file system; else it is the relay's own
        cure = "set XDG_RUNTIME_DIR to a folder that this user can write to"
    else:
        cure = f"see what `{Path(sys.executable).name} -m otel_npu.relay` says"
    return f"{cure}; with OTEL_NPU_EXPORT=inprocess none is needed"
