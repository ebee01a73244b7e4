"""The screen of `otel-npu top`."""

from __future__ import annotations

from typing import Any, Final

from rich.console import Group
from rich.table import Table
from rich.text import Text

SORTS: Final = ("share", "p50_ms", "p99_ms", "per_second", "name")
_MAX_STAGES: Final = 14
_MAX_RANKS: Final = 16
_MAX_BARS: Final = 14
_LEAST_BAR_COLUMNS: Final = 20
_NAME_COLUMNS: Final = 26
_BOUND_STYLES: Final = {"launch-bound": "yellow", "device-bound": "green", "host": "dim", "unsure": "dim"}


def draw(
    found: dict[str, Any],
    columns: int,
    *,
    sort: str = SORTS[0],
    rank: int | None = None,
    frozen: bool = False,
    keys: bool = False,
) -> Group:
    """One screen.

    Args:
        found: The figures, as `Top.found` gives them.
        columns: How wide it is.
        sort: By which column stages stand.
        rank: Whose stages they are; None for all.
        frozen: Whether it stands still.
        keys: Whether to say which keys there are.
    """
    parts: list[Any] = [*_head(found, frozen=frozen), _stages(found["stages"], sort, rank), Text()]
    parts.append(_ranks(found["ranks"]))
    if found["slowest_step"] is not None:
        parts += [Text(), *_waterfall(found["slowest_step"], columns)]
    parts += [Text(), _left_out(found)]
    if keys:
        parts.append(Text("q quit   s sort   r rank   f freeze", "dim"))
    return Group(*parts)


def _head(found: dict[str, Any], *, frozen: bool) -> list[Text]:
    off = "" if found["on"] == found["processes"] else f", {found['processes'] - found['on']} of them off"
    first = Text(f"session {found['session']}: {found['processes']} processes{off}", "bold")
    first.append(f", figures of the last {found['seconds']:.0f} s", "dim")
    if frozen:
        first.append("  FROZEN", "bold yellow")
    total = sum(found["steps_per_second"].values())
    kinds = ", ".join(
        f"{kind or 'step'} {rate:.1f}" for kind, rate in sorted(found["steps_per_second"].items(), key=lambda x: -x[1])
    )
    second = Text()
    second.append(f"{total:.1f}", "bold cyan").append(f" steps/s ({kinds})   " if kinds else " steps/s   ")
    second.append(f"{found['tokens_per_second']:.0f}", "bold cyan").append(" tokens/s scheduled   ")
    second.append(f"{found['requests_per_step']:.1f}", "bold cyan").append(" requests a step")
    if found["hangs"]:
        second.append(f"   {found['hangs']} stages hang", "bold red")
    return [first, second, Text()]


def _stages(rows: list[dict[str, Any]], sort: str, rank: int | None) -> Table:
    whose = "stage" if rank is None else f"stage of rank {rank}"
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(whose, min_width=_NAME_COLUMNS, no_wrap=True)
    for name in ("share", "/s", "p50 ms", "p99 ms", "host ms", "device ms"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("bound by", no_wrap=True)
    ordered = sorted(rows, key=lambda row: row[sort] if sort == "name" else -row[sort])
    for row in ordered[:_MAX_STAGES]:
        table.add_row(
            row["name"],
            f"{row['share']:.1%}",
            f"{row['per_second']:.1f}",
            f"{row['p50_ms']:.3f}",
            f"{row['p99_ms']:.3f}",
            _number(row["host_ms"]),
            _number(row["device_ms"]),
            Text(row["bound"], _BOUND_STYLES[row["bound"]]),
        )
    if len(ordered) > _MAX_STAGES:
        table.add_row(Text(f"and {len(ordered) - _MAX_STAGES} more", "dim"))
    return table


def _ranks(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("rank", min_width=_NAME_COLUMNS, no_wrap=True)
    for name in ("steps/s", "busy", "idle", "straggles/s", "clock +- us"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("timed by", no_wrap=True)
    for row in rows[:_MAX_RANKS]:
        table.add_row(
            f"process {row['pid']}" if row["rank"] is None else f"{row['rank']}, process {row['pid']}",
            f"{row['steps_per_second']:.1f}" if row["rank"] is not None else "-",
            f"{row['busy']:.0%}",
            "-" if row["idle"] is None else f"{row['idle']:.0%}",
            f"{row['straggles_per_second']:.1f}",
            _number(row["clock_uncertainty_us"], 1),
            row["timing"],
        )
    if len(rows) > _MAX_RANKS:
        table.add_row(Text(f"and {len(rows) - _MAX_RANKS} more", "dim"))
    return table


def _waterfall(step: dict[str, Any], columns: int) -> list[Text]:
    of = f", rank {step['rank']} of {step['ranks']}" if step["rank"] is not None else ""
    size = "" if step["tokens"] is None else f", {step['tokens']} tokens of {step['requests']} requests"
    what = step["kind"] or "step"
    lines = [Text(f"slowest step of the last minute: {what} {step['number']}, {step['ms']:.2f} ms{size}{of}", "bold")]
    width = max(_LEAST_BAR_COLUMNS, columns - _NAME_COLUMNS - 12)
    longest = sorted(step["stages"], key=lambda bar: -bar["ms"])[:_MAX_BARS]
    for bar in step["stages"]:
        if bar not in longest:
            continue
        first = max(0, min(width - 1, round(bar["start_ms"] / step["ms"] * width)))
        length = max(1, min(width - first, round(bar["ms"] / step["ms"] * width)))
        name = f"{'  ' * bar['depth']}{bar['name']}"[: _NAME_COLUMNS - 1]
        line = Text(f"{name:<{_NAME_COLUMNS}}")
        line.append(" " * first).append("\N{FULL BLOCK}" * length, "green" if bar["timing"] == "device" else "blue")
        line.append(" " * (width - first - length)).append(f"{bar['ms']:9.3f} ms", "dim")
        lines.append(line)
    if len(step["stages"]) > len(longest):
        lines.append(Text(f"and {len(step['stages']) - len(longest)} shorter ones", "dim"))
    return lines


def _left_out(found: dict[str, Any]) -> Text:
    dropped = ", ".join(f"{count} {reason}" for reason, count in sorted(found["dropped"].items()))
    text = Text(f"left out so far: {dropped or 'nothing'}", "yellow" if dropped else "dim")
    if found["unseen_packets"]:
        text.append(f"; {found['unseen_packets']} packets came too fast for this screen", "yellow")
    return text


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
