"""`otel-npu off`, `on` and `status`."""

from __future__ import annotations

import json as json_module
import sys
import time
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

import msgspec
from rich.console import Console
from rich.table import Table

from otel_npu.cli.looking import fail, look
from otel_npu.wire import frames, looking

if TYPE_CHECKING:
    from otel_npu.looking.session import Connection
    from otel_npu.wire.looking import Session

_OBEY_SECONDS: Final = 3.0
_AGAIN_SECONDS: Final = 0.5
_LOOK_SECONDS: Final = 0.05
_COUNT_SECONDS: Final = 1.0
_FILE_COLUMNS: Final = 160


def switch(session: str | None, pid: int | None, *, on: bool) -> int:
    """Have all processes of a session capture, or nothing; the exit code: 0 once all have said that they do."""

    def work(connection: Connection) -> int:
        word = "on" if on else "off"
        deadline, again = time.monotonic() + _OBEY_SECONDS, 0.0
        while True:
            if time.monotonic() >= again:  # once more: a process may have been about to connect
                connection.switch(on=on)
                again = time.monotonic() + _AGAIN_SECONDS
            state = connection.ask()
            others = [process.pid for process in state.processes if process.on != on]
            if not others and not state.silent:
                break
            if time.monotonic() >= deadline:
                silent = f"{state.silent} that have not said who they are" if state.silent else ""
                which = " and ".join(filter(None, [", ".join(map(str, others)), silent]))
                return fail(f"capture is not {word} everywhere: no answer within {_OBEY_SECONDS:.0f} s from {which}")
            time.sleep(_LOOK_SECONDS)
        count = len(state.processes)
        sys.stdout.write(f"capture is {word} in session {connection.session}, in all its {count} processes\n")
        return 0

    return look(work, session, pid)


def status(session: str | None, pid: int | None, *, json: bool) -> int:
    """Show who is connected, what is on, what goes on in a second, and what was left out; the exit code."""

    def work(connection: Connection) -> int:
        connection.ask(follow=True)
        began = time.monotonic()
        steps: Counter[int] = Counter()
        ranks: dict[int, int] = {}
        for view in connection.views(_COUNT_SECONDS):
            if isinstance(view, looking.Seen):
                _count(view, steps, ranks)
        seconds = time.monotonic() - began
        rows = _rows(connection.ask(), steps, ranks, seconds)
        found = _found(connection.session, connection.state, rows)
        if json:
            sys.stdout.write(json_module.dumps(found, indent=2) + "\n")
        else:
            _show(found)
        return 0

    return look(work, session, pid)


def _count(view: looking.Seen, steps: Counter[int], ranks: dict[int, int]) -> None:
    """Count the steps in a packet, and note whose they are."""
    try:
        each = list(map(frames.decode_frame, frames.frames_in(view.packet)))
    except (msgspec.MsgspecError, ValueError):
        return
    for one in each:
        if isinstance(one, frames.Step):
            steps[view.number] += 1
            ranks[view.number] = one.rank
        elif isinstance(one, frames.Scheduled) and one.total_tokens:
            steps[-view.number] += 1  # an engine's, beside those of the rank that may share its process


def _rows(state: Session, steps: Counter[int], ranks: dict[int, int], seconds: float) -> list[dict[str, Any]]:
    rows = []
    for process in state.processes:
        row: dict[str, Any] = {
            "pid": process.pid,
            "on": process.on,
            "service": process.service_name,
            "device": " ".join(filter(None, [process.device_kind, process.device_name])),
            "steps_per_second": round(steps[process.number] / seconds, 1),
        }
        if ranks.get(process.number, -1) >= 0:
            row["rank"] = ranks[process.number]
        if steps[-process.number]:
            row["engine_steps_per_second"] = round(steps[-process.number] / seconds, 1)
        rows.append(row)
    return rows


def _found(session: str, state: Session, rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "session": session,
        "relay": {
            "pid": state.pid,
            "waiting_bytes": state.waiting_bytes,
            "limit_bytes": state.limit_bytes,
            "exported_spans": state.exported_spans,
        },
        "processes": rows,
        "silent": state.silent,
        "dropped": state.dropped,
    }


def _show(found: dict[str, Any]) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _FILE_COLUMNS
    relay = found["relay"]
    console.print(
        f"session {found['session']}, relay {relay['pid']}: {relay['exported_spans']} spans exported, "
        f"{relay['waiting_bytes'] / 1e6:.1f} of {relay['limit_bytes'] / 1e6:.0f} MB wait",
        soft_wrap=True,
    )
    table = Table("process", "capture", "rank", "steps/s", "engine steps/s", "device", "service", box=None)
    for row in found["processes"]:
        table.add_row(
            str(row["pid"]),
            "on" if row["on"] else "off",
            str(row.get("rank", "-")),
            f"{row['steps_per_second']:g}",
            f"{row['engine_steps_per_second']:g}" if "engine_steps_per_second" in row else "-",
            row["device"] or "-",
            row["service"] or "-",
        )
    console.print(table)
    if found["silent"]:
        console.print(f"and {found['silent']} that have sent nothing yet")
    dropped = ", ".join(f"{count} {reason}" for reason, count in sorted(found["dropped"].items()))
    console.print(f"left out so far: {dropped or 'nothing'}", soft_wrap=True)
