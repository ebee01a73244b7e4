"""What it costs to look at a running session: its model's process, its relay, and whoever looks.

    python -m benchmarks.viewer_cost [--rounds N]

A traced process steps at the pace of four ranks of a server. Blocks in which nobody looks, in which `otel-npu top` does
and in which `otel-npu record` does take turns.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pty
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import otel_npu
from benchmarks.comparing import cpu_ns, median, serve, subjects

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks.comparing import Subject

SESSION: Final = "viewed"
STEPS_A_SECOND: Final = 400
STAGES: Final = ("prepare_input", "forward", "post_process", "sample", "bookkeep", "eplb", "model_runner_output")
BLOCK_SECONDS: Final = 4.0
_ATTACH_SECONDS: Final = 4.0
"""By then whoever looks has been started and is at it."""
_WHO: Final = ("nobody", "top", "record")
_FIGURES: Final = {
    "step": "the model's thread, us a step, processor time",
    "process": "the model's process, all threads",
    "wall": "a step, us on the wall (median of a block)",
    "relay": "the relay, us a step, processor time",
    "viewer": "whoever looks, us a step, processor time",
}


def steps(seconds: float) -> dict[str, float]:
    """Microseconds a step, of steps at that pace for so long."""
    spent = 0
    walls = []
    before, began = time.process_time_ns(), time.monotonic()
    due = began
    while (now := time.monotonic()) < began + seconds:
        cpu, wall = time.thread_time_ns(), time.perf_counter_ns()
        with otel_npu.step("decode"):
            for name in STAGES:
                with otel_npu.stage(name):
                    pass
        walls.append(time.perf_counter_ns() - wall)
        spent += time.thread_time_ns() - cpu
        due += 1 / STEPS_A_SECOND
        time.sleep(max(0.0, due - now))
    count = len(walls)
    process = time.process_time_ns() - before
    wall = sorted(walls)[count // 2]
    return {"count": count, "step": spent / count / 1e3, "process": process / count / 1e3, "wall": wall / 1e3}


@contextlib.contextmanager
def looking(who: str, folder: Path) -> Iterator[Callable[[], int]]:
    """Whoever looks; gives its processor time so far, in nanoseconds."""
    if who == "nobody":
        yield lambda: 0
        return
    ours, theirs = pty.openpty()
    arguments = ["record", "--seconds", "600", "-o", str(folder / "x.json")] if who == "record" else ["top"]
    process = subprocess.Popen(  # noqa: S603
        [str(Path(sys.executable).with_name("otel-npu")), *arguments, "--session", SESSION],
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120", "LINES": "40"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)

    def read() -> None:
        with contextlib.suppress(OSError):
            while os.read(ours, 1 << 16):
                pass

    reader = threading.Thread(target=read)
    reader.start()
    time.sleep(_ATTACH_SECONDS)
    try:
        yield lambda: cpu_ns(Path(f"/proc/{process.pid}/task").iterdir())
        assert process.poll() is None, f"{who} has ended"
    finally:
        process.kill()
        process.wait()
        reader.join()
        os.close(ours)


def block(subject: Subject, who: str, folder: Path) -> dict[str, float]:
    """The figures of one block."""
    with looking(who, folder) as viewer_ns:
        relay, viewer = subject.relay_ns(), viewer_ns()
        measured: dict[str, float] = subject.ask(seconds=BLOCK_SECONDS)
        count = measured["count"] * 1e3
        return {
            **measured,
            "relay": (subject.relay_ns() - relay) / count,
            "viewer": (viewer_ns() - viewer) / count,
        }


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="blocks of each (default: 10)")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.serve:
        serve(lambda: steps)
    environment = {
        "OTEL_NPU_ENABLED": "1",
        "OTEL_NPU_DEVICE": "cpu",
        "OTEL_NPU_SESSION": SESSION,
        "OTEL_METRICS_EXPORTER": "none",
    }
    blocks: dict[str, list[dict[str, float]]] = {who: [] for who in _WHO}
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as folder,
        subjects("benchmarks.viewer_cost", ["--serve"], environment, None) as (subject,),
    ):
        subject.ask(seconds=2.0)
        for number in range(chosen.rounds):
            for who in _WHO if number % 2 else reversed(_WHO):
                blocks[who].append(block(subject, who, Path(folder)))
    print(f"{chosen.rounds} blocks of {BLOCK_SECONDS:g} s, {STEPS_A_SECOND} steps a second of {len(STAGES)} stages")
    print("median, and of `top` and `record` what they add to the block beside them (95 % interval)")
    for figure, title in _FIGURES.items():
        _print(title, {who: [each[figure] for each in blocks[who]] for who in _WHO})


def _print(title: str, taken: dict[str, list[float]]) -> None:
    nobody = taken["nobody"]
    cells: list[Any] = [f"nobody {median(nobody).value:.1f}"]
    for who in _WHO[1:]:
        added = [one - other for one, other in zip(taken[who], nobody, strict=True)]
        cells.append(f"{who} {median(added)}")
    print(f"  {title:<46}" + "".join(f"{cell:>32}" for cell in cells))


if __name__ == "__main__":
    main()
