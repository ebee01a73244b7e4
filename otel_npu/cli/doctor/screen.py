"""The findings on one screen, or as JSON."""

from __future__ import annotations

import itertools
import json
import textwrap
from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Final

from rich.console import Console
from rich.text import Text

from otel_npu._version import __version__
from otel_npu.cli.doctor.findings import Finding, Status

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_STYLES: Final = {
    Status.OK: ("\N{CHECK MARK}", "ok", "green"),
    Status.FAILED: ("\N{BALLOT X}", "FAILED", "bold red"),
    Status.WARNING: ("!", "!", "yellow"),
    Status.NOT_APPLICABLE: ("-", "-", "dim"),
}
_NAME_COLUMNS: Final = 14


def show(findings: Sequence[Finding]) -> None:
    """Print a line for each finding, and the cure below what is wrong."""
    console = Console(highlight=False)
    unicode = console.encoding.lower().startswith("utf")
    for finding in _joined(findings):
        sign, word, style = _STYLES[finding.status]
        mark = sign if unicode else f"{word:<6}"
        head = f"{mark} {finding.check:<{_NAME_COLUMNS}} "
        line = Text(style=style if finding.status is not Status.OK else "")
        line.append(mark, style)
        line.append(_wrapped(console, head, finding.found)[len(mark) :])
        console.print(line, soft_wrap=True)
        if finding.cure:
            arrow = "\N{RIGHTWARDS ARROW}" if unicode else "->"
            console.print(Text(_wrapped(console, f"{'':<{len(head)}}{arrow} ", finding.cure), "bold"), soft_wrap=True)
    console.print(Text(f"\n{_summary(findings)}", "bold"), soft_wrap=True)


def _joined(findings: Sequence[Finding]) -> Iterator[Finding]:
    """The findings, those that say the same one after the other as one row."""
    for (status, found, cure), group in itertools.groupby(findings, lambda one: (one.status, one.found, one.cure)):
        first, *others = (finding.check for finding in group)
        yield Finding(first, status, f"{found} ({', '.join(others)} too)" if others else found, cure)


def as_json(findings: Sequence[Finding]) -> str:
    """One object: whether nothing failed, this version, and the findings."""
    return json.dumps(
        {"ok": not any_failed(findings), "version": __version__, "checks": [asdict(finding) for finding in findings]},
        indent=2,
    )


def any_failed(findings: Sequence[Finding]) -> bool:
    """Whether anything is red."""
    return any(finding.status is Status.FAILED for finding in findings)


def _summary(findings: Sequence[Finding]) -> str:
    counts = Counter(finding.status for finding in findings)
    failures, warnings = counts[Status.FAILED], counts[Status.WARNING]
    if not failures and not warnings:
        return "Nothing is wrong."
    return f"{failures} failed, {warnings} to look at." if failures else f"Nothing failed, {warnings} to look at."


def _wrapped(console: Console, head: str, text: str) -> str:
    if not console.is_terminal:  # for a log or a search, one line
        return head + text
    return textwrap.fill(
        text,
        width=max(console.width, 2 * len(head)),
        initial_indent=head,
        subsequent_indent=" " * len(head),
        break_long_words=False,
        break_on_hyphens=False,
    )
