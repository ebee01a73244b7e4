"""`otel-npu record`: all that a running session does for a while, as a file."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from otel_npu.cli.looking import fail, look
from otel_npu.looking import otlp_json, perfetto
from otel_npu.looking.model import Model
from otel_npu.looking.recording import Recording

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from otel_npu.looking.session import Connection
    from otel_npu.looking.span import Span

ENDINGS: Final = (".perfetto.json.gz", ".json", ".html")


def run(session: str | None, pid: int | None, seconds: float, file: Path | None, slowest: int | None) -> int:
    """Record and write; the exit code: 1 if something is missing."""
    os.nice(5)  # the model goes first
    path = file or Path(time.strftime("otel-npu-%Y%m%d-%H%M%S.perfetto.json.gz"))
    if not path.name.endswith(ENDINGS):
        return fail(f"{path}: a file ends in {', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}")
    if path.suffix == ".html" and importlib.util.find_spec("plotly") is None:
        return fail("a page needs Plotly: pip install 'otel-npu[report]'")
    try:  # now, not after all that was to be recorded is over
        with path.open("ab"):
            pass
    except OSError as error:
        return fail(f"{path} can't be written: {error.strerror}")

    def work(connection: Connection) -> int:
        recording, stopped = Recording(), threading.Event()
        with _interrupts(stopped), _bar(connection.session, seconds) as (progress, tell):
            recording.run(connection, seconds, stopped.is_set, tell)
            progress.update(progress.task_ids[0], description="putting together")
            spans = recording.spans(connection, slowest)
        try:
            path.write_bytes(content(spans, path.name))
        except OSError as error:
            return fail(f"{path} can't be written: {error.strerror}")
        took = (recording.ended_ns - recording.began_ns) * 1e-9
        model = Model(spans)
        size = path.stat().st_size
        sys.stdout.write(
            f"{path}: {len(model.steps)} steps and {len(model.requests)} requests, {len(spans)} spans of {took:.1f} s, "
            f"{size / 1e6:.1f} MB\n"
        )
        return fail(recording.cut) if recording.cut else 0

    return look(work, session, pid)


def content(spans: Sequence[Span], name: str) -> bytes:
    """What a file of this name holds."""
    if name.endswith(".perfetto.json.gz"):
        return perfetto.write(spans)
    if name.endswith(".html"):
        from otel_npu.looking.report.page import page

        return page(spans).encode()
    return "".join(otlp_json.lines(spans)).encode()


@contextlib.contextmanager
def _interrupts(stopped: threading.Event) -> Iterator[None]:
    """Ctrl-C ends the recording, and what there is is kept; a second one ends the command."""

    def stop(*_: object) -> None:
        stopped.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _bar(session: str, seconds: float) -> Iterator[tuple[Progress, Callable[[float], None]]]:
    """A bar, and what to call with the seconds that are done; without a terminal one line when it has begun."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("recording", total=seconds)

        def tell(done: float) -> None:
            if progress.disable and not progress.tasks[0].completed:
                console.print(f"recording session {session} for {seconds:g} s: Ctrl-C ends it and keeps what there is")
            progress.update(task, completed=done)

        yield progress, tell
