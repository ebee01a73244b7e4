"""`otel-npu status`: who is in a running session, and what goes on there."""

from __future__ import annotations

import json as json_module
import sys
import time
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

import msgspec
from rich.console import Console
from rich.table import Table

from otel_npu.cli.looking import look
from otel_npu.wire import frames, looking

if TYPE_CHECKING:
    from otel_npu.looking.session import Connection
    from otel_npu.wire.looking import Session

_COUNT_SECONDS: Final = 1.0
_FILE_COLUMNS: Final = 160


def run(session: str | None, pid: int | None, *, json: bool) -> int:
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
