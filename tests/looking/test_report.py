"""The page of `report`: its figures, that it stands alone, and, where there is a browser, that it works in one."""

from __future__ import annotations

import base64
import gzip
import json
import random
import re
import shutil
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from otel_npu.looking.model import Model
from otel_npu.looking.report import page as page_module
from otel_npu.looking.report.facts import Facts, middle, ratio, request_row
from otel_npu.looking.report.page import MissingLibraryError, page
from otel_npu.looking.report.timeline import Timeline
from otel_npu.looking.span import Span
from tests.looking.test_recording import STEPS, recorded

if TYPE_CHECKING:
    from pathlib import Path

PLOTLY = "window.Plotly = {react: () => {}};"


@pytest.fixture(scope="module")
def spans() -> list[Span]:
    return recorded().spans()


@pytest.fixture
def without_plotly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its five megabytes are not what a test looks at."""
    monkeypatch.setattr(page_module, "_plotly", lambda: PLOTLY)


def test_the_sentence_says_where_the_time_went(spans: list[Span]) -> None:
    facts = Facts(Model(spans))
    assert facts.sentence().startswith(f"In 0.8 s there were {STEPS} steps, half of them within 11.50 ms. Rank ")
    assert re.search(r"busy for 4\d% of the time, most of it with forward \(4\d%\)", facts.sentence())
    first = next(rank for rank in facts.ranks.values() if rank.name == "rank 0")
    assert first.steps == STEPS
    assert first.idle == pytest.approx(STEPS * 0.012, rel=0.1)
    assert first.busy == pytest.approx((STEPS - 1) * 0.008 + 0.030, rel=0.01)


def test_stages_inside_others_count_once_in_the_whole(spans: list[Span]) -> None:
    facts = Facts(Model(spans))
    assert facts.stages["attention"].outermost == 0
    assert len(facts.stages["attention"].durations) == 2 * STEPS


def test_an_interval_of_a_median_covers_it_as_often_as_it_says() -> None:
    chance = random.Random(5)
    hits = ratios = 0
    for _ in range(300):
        one, other = ([chance.lognormvariate(0, 0.5) for _ in range(60)] for _ in range(2))
        found, times = middle(one), ratio(one, other)
        hits += found.low <= 1 <= found.high
        assert times is not None
        ratios += times.low <= 1 <= times.high
    assert hits >= 0.92 * 300
    assert ratios >= 0.92 * 300


def test_what_is_twice_as_long_is_slower_and_of_a_few_nothing_is_said() -> None:
    times = ratio([1.0 + i / 1000 for i in range(50)], [2.0 + i / 1000 for i in range(50)])
    assert times is not None
    assert times.low > 1.9
    assert ratio([1.0] * 5, [1.0] * 5) is None


def test_two_runs_are_set_side_by_side(spans: list[Span], without_plotly: None) -> None:
    for span in (slower := recorded().spans()):
        span.end_ns += span.duration_ns
    text = page(slower, spans, ("after", "before"))
    row = re.search(r"<tr><td>forward</td>(.*?)</tr>", text)
    assert row is not None
    assert "2.000 (" in row[1]
    assert "class='slower'>slower" in row[1]


def test_the_timeline_has_every_span_once_in_a_row_of_its_own_kind(spans: list[Span]) -> None:
    timeline = Timeline(Model(spans))
    columns = json.loads(gzip.decompress(base64.b64decode(timeline.columns())))
    assert timeline.count == len(spans) == len(columns["start"]) == len(columns["row"])
    for number in range(timeline.count):
        row, name = columns["rows"][columns["row"][number]], columns["names"][columns["name"][number]]
        assert row.startswith("engine") == (name == "engine_step")
        assert ("inside" in row) == (name == "attention")


def test_requests_have_their_phases() -> None:
    def span(name: str, start: int, end: int, **attributes: Any) -> Span:
        given = {key.replace("__", "."): value for key, value in attributes.items()}
        return Span(name, "t", name, "parent", start * 10**9, end * 10**9, given, {})

    (request,) = Model(
        [
            span("queue", 0, 1, gen_ai__response__id="cmpl-1"),
            span("prefill", 1, 3, npu__request__steps=2, npu__request__device_time=1.5),
            span("decode", 3, 9, npu__request__steps=40, npu__request__device_time=4.0),
        ]
    ).requests
    row = request_row(request)
    assert (row["name"], row["seconds"], row["queue"], row["kv"], row["prefill"]) == ("cmpl-1", 9, 1, None, 2)
    assert (row["decode"], row["steps"], row["device"]) == (6, 42, 5.5)


def test_nothing_that_a_span_says_becomes_part_of_the_page(spans: list[Span], without_plotly: None) -> None:
    bad = "</script><script>alert(1)</script><img src=x>"
    for span in (odd := recorded(steps=3).spans()):
        if span.name == "forward":
            span.name = bad
        span.resource = {**span.resource, "service.name": bad, "host.name": bad}
    text = page(odd)
    assert "<script>alert(1)" not in text
    assert "<img" not in text


def test_the_page_loads_nothing(spans: list[Span], without_plotly: None) -> None:
    text = page(spans)
    assert not re.findall(r'(?:src|href)="(?!data:)', text)
    assert "default-src 'none'" in text


def test_without_plotly_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, spans: list[Span]) -> None:
    monkeypatch.setitem(__import__("sys").modules, "plotly.offline", None)
    with pytest.raises(MissingLibraryError, match=r"pip install 'otel-npu\[report\]'"):
        page(spans)


DRIVE = """
<script>
const until = async (done) => { while (!done()) await new Promise((go) => setTimeout(go, 20)); };
(async () => {
  await until(() => document.documentElement.dataset.ready);
  const chart = document.getElementById("timeline");
  const bars = chart.data[0].x.length;
  await Plotly.relayout(chart, {"xaxis.range[0]": 0, "xaxis.range[1]": 25});
  await until(() => chart.layout.xaxis.range[1] === 25 && chart.data[0].x.length !== bars);
  const number = chart.data[0].hovertext.findIndex((text) => text.startsWith("forward"));
  chart.emit("plotly_click", {points: [{pointNumber: number}]});
  await until(() => document.querySelector("#detail table"));
  const detail = document.getElementById("detail").innerText;
  document.querySelector("tr[data-start]").click();
  await until(() => chart.layout.xaxis.range[0] > 25);
  document.body.dataset.driven = JSON.stringify({bars, detail,
    loaded: performance.getEntriesByType("resource").map((entry) => entry.name)});
})();
</script></body>"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_in_a_browser_it_opens_zooms_and_shows_what_is_clicked(tmp_path: Path, spans: list[Span]) -> None:
    pytest.importorskip("plotly")
    path = tmp_path / "page.html"
    path.write_text(page(spans).replace("</body>", DRIVE))
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    done = subprocess.run(
        ["chromium", *options, "--virtual-time-budget=60000", "--dump-dom", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=180,
        check=True,
    )
    driven = re.search(r'data-driven="([^"]*)"', done.stdout)
    assert driven is not None, done.stdout[-2000:]
    found = json.loads(driven[1].replace("&quot;", '"'))
    assert found["bars"] > 0
    assert "forward" in found["detail"]
    assert "npu.device.duration" in found["detail"]
    assert found["loaded"] == []
