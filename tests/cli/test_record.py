"""`otel-npu record`, beside a program that runs."""

from __future__ import annotations

import signal
import time
from typing import TYPE_CHECKING

import pytest

from otel_npu.looking import otlp_json
from otel_npu.looking.model import Model
from otel_npu.looking.session import connect
from tests.helpers.command_line import line_of, otel_npu_command
from tests.helpers.traced import PATIENCE_SECONDS, Programs, eventually

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from otel_npu.wire.looking import View

HERE = {"OTEL_NPU_SESSION": "here", "OTEL_TRACES_EXPORTER": "none", "OTEL_NPU_STEPS_PER_SECOND": "0"}
FOR_LONG = "[(steps(1), time.sleep(0.01)) for _ in range(100_000)]"


@pytest.fixture(autouse=True)
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A program that steps, none of which is a trace, in a session of its own."""
    with Programs(tmp_path) as running:
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(running.run_folder))
        worker = running.start(HERE)
        worker.ask("steps(1)")
        worker.tell(FOR_LONG)
        yield


def test_every_step_is_recorded_although_none_is_kept_elsewhere(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    done = otel_npu_command("record", "--seconds", "1", "-o", str(path), "--session", "here")
    assert done.returncode == 0, done.stderr
    model = Model(otlp_json.read(path))
    numbers = [step.attributes["npu.step.number"] for step in model.steps]
    assert numbers == list(range(numbers[0], numbers[-1] + 1))
    assert f"{len(numbers)} steps and 0 requests" in done.stdout


def test_ctrl_c_ends_it_and_keeps_what_there_is(tmp_path: Path, start: Callable[..., subprocess.Popen[str]]) -> None:
    path = tmp_path / "out.json"
    recording = start("record", "--seconds", "600", "-o", str(path), "--session", "here")
    assert line_of(recording) == "recording session here for 600 s: Ctrl-C ends it and keeps what there is\n"
    with connect("here") as looks:  # what comes here comes there too
        looks.ask(follow=True)
        seen: list[View] = []
        eventually(lambda: seen.extend(looks.views(0.1)) or len(seen) > 3, "steps are recorded")  # type: ignore[func-returns-value]
    recording.send_signal(signal.SIGINT)
    assert recording.wait(PATIENCE_SECONDS) == 0
    assert otlp_json.read(path)


def test_what_can_not_be_written_is_one_line_before_anything_is_recorded(tmp_path: Path) -> None:
    began = time.monotonic()
    for name, complaint in (
        ("missing/out.json", "can't be written: No such file or directory"),
        ("out.txt", "a file ends in .perfetto.json.gz, .json or .html"),
    ):
        done = otel_npu_command("record", "--seconds", "600", "-o", str(tmp_path / name), "--session", "here")
        assert done.returncode == 1
        assert complaint in done.stderr
        assert done.stderr.count("\n") == 1
    assert time.monotonic() - began < 600


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "full.json"
    path.symlink_to("/dev/full")
    done = otel_npu_command("record", "--seconds", "0.2", "-o", str(path), "--session", "here")
    assert done.returncode == 1
    _, error = done.stderr.splitlines()  # the first says that it has begun
    assert error == f"otel-npu: {path} can't be written: No space left on device"
