"""The README's picture of the demo is what the demo shows."""

from __future__ import annotations

import html
import re
import struct
from collections import defaultdict

import pytest

from tests.helpers import REPOSITORY
from tests.helpers.command_line import otel_npu_command

PICTURES = REPOSITORY / "docs/pictures"
BARS = "█▌▐▄▖▗"


def lines_of(svg: str) -> list[str]:
    """The lines of text in a picture of a terminal."""
    lines: defaultdict[float, list[tuple[float, str]]] = defaultdict(list)
    for x, y, text in re.findall(r'<text[^>]* x="([\d.]+)" y="([\d.]+)"[^>]*>(.*?)</text>', svg):
        lines[float(y)].append((float(x), html.unescape(text).replace("\xa0", " ")))
    return ["".join(text for _, text in sorted(parts)).rstrip() for _, parts in sorted(lines.items())]


def said(lines: list[str]) -> str:
    """The sentences below the picture, without their figures."""
    first = next(number for number, line in enumerate(lines) if line.startswith("Request "))
    text = " ".join(" ".join(lines[first:]).split())
    text = re.sub(r" steps \(.*?\)", " steps", text)  # which were kept depends on when they ran
    text = re.sub(r"cmpl-\w+", "cmpl-x", re.sub(r"\S*otel-npu demo", "otel-npu demo", text))
    return re.sub(r"\b\d[\d,.]*\b", "0", text)


def rows(lines: list[str]) -> list[str]:
    """What the bars are of."""
    return [match[1] for line in lines if (match := re.match(rf"^ +([a-z_]+)(?:, \d+)? +[{BARS}]", line))]


@pytest.fixture(scope="module")
def drawn() -> list[str]:
    picture = lines_of((PICTURES / "demo.svg").read_text())
    return picture[next(number for number, line in enumerate(picture) if line.endswith(" ms")) :]


@pytest.fixture(scope="module")
def printed() -> list[str]:
    done = otel_npu_command("demo", "--requests", "4")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_the_picture_says_what_the_demo_says(drawn: list[str], printed: list[str]) -> None:
    assert said(drawn) == said(printed)


def test_the_picture_has_the_rows_that_the_demo_has(drawn: list[str], printed: list[str]) -> None:
    always = ["llm_request", "queue", "prefill", "decode", "decode_step", "forward", "all_reduce"]
    for lines in (drawn, printed):
        assert [row for row in rows(lines) if row != "other_steps"][: len(always)] == always
        assert set(rows(lines)) <= {*always, "other_steps", "prefill_step", "attention", "mlp"}


def test_the_pictures_of_a_request_are_there_and_not_too_heavy() -> None:
    for name in ("vllm-alone.png", "vllm-with-stages.png"):
        picture = (PICTURES / name).read_bytes()
        width, height = struct.unpack(">II", picture[16:24])
        assert width > 1200
        assert height > 100
        assert len(picture) < 300_000


def test_the_picture_of_top_has_the_columns_that_top_has() -> None:
    text = "\n".join(lines_of((PICTURES / "top.svg").read_text()))
    for column in ("steps/s", "tokens/s", "share", "p50 ms", "p99 ms", "bound by", "busy", "straggles/s"):
        assert column in text
    assert "slowest step of the last minute" in text


def test_the_picture_of_a_report_is_there_and_not_too_heavy() -> None:
    assert 10_000 < (PICTURES / "report.png").stat().st_size < 300_000
