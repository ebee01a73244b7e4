"""`otel-npu report`, as a person calls it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from otel_npu.looking import otlp_json
from tests.helpers.command_line import otel_npu_command
from tests.looking.test_recording import recorded

if TYPE_CHECKING:
    from pathlib import Path


def test_files_of_several_hosts_make_one_page(tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    spans = recorded(steps=5).spans()
    ranks = [[span for span in spans if span.resource["service.instance.id"] == f"rank-{rank}"] for rank in (0, 1)]
    paths = [tmp_path / "one.json", tmp_path / "two.json"]
    for path, part in zip(paths, ranks, strict=True):
        path.write_text("".join(otlp_json.lines(part)))
    done = otel_npu_command("report", *map(str, paths), "-o", str(tmp_path / "page.html"))
    assert done.returncode == 0, done.stderr
    assert "5 steps of 2 ranks on host" in (tmp_path / "page.html").read_text()


def test_a_file_that_is_none_is_one_line(tmp_path: Path) -> None:
    done = otel_npu_command("report", str(tmp_path / "none.json"))
    assert done.returncode == 1
    assert done.stderr == f"otel-npu: {tmp_path / 'none.json'} can't be read: No such file or directory\n"
