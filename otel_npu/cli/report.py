"""`otel-npu report`: a page of what files of spans show."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from otel_npu.cli.looking import fail
from otel_npu.looking.otlp_json import ReadError, read
from otel_npu.looking.report.page import MissingLibraryError, page

if TYPE_CHECKING:
    from collections.abc import Sequence

    from otel_npu.looking.span import Span


def run(files: Sequence[Path], output: Path | None, other: Sequence[Path]) -> int:
    """Read and write; the exit code: 1 if a file can't be read or the page not be written."""
    try:
        spans, compared = _read(files), _read(other)
        names = _names(files), _names(other)
        made = page(spans, compared, names)
    except (ReadError, MissingLibraryError) as error:
        return fail(str(error))
    path = output or Path(f"{_names(files[:1])}.html")
    try:
        path.write_text(made)
    except OSError as error:
        return fail(f"{path} can't be written: {error.strerror}")
    sys.stdout.write(f"{path}: {len(spans)} spans, {path.stat().st_size / 1e6:.1f} MB\n")
    return 0


def _read(files: Sequence[Path]) -> list[Span]:
    return [span for path in files for span in read(path)]


def _names(files: Sequence[Path]) -> str:
    return ", ".join(path.name.removesuffix(".gz").removesuffix(".json") for path in files)
