"""What a whole step of six stages costs its thread, with hot and with cold caches, and where the time goes.

Needs no accelerator: `cpu` has no events, and an NPU is simulated behind the real torch_npu binding. Run from the
repository:

    python -m benchmarks.step_cost [--against REVISION]

Between two steps a server runs millions of instructions, so a step always finds its code and its objects out of the
caches: "cold" steps have 80 MB of other objects walked before each. A loop of nothing but steps ("hot") costs a third
of it and says little about a server.

Costs are processor time of the thread that runs the steps, the mean of a block of steps, because some work is done for
several steps at once. What goes on elsewhere is told too: our own threads in the process, and the relay. With
`--against` the blocks of both revisions take turns, and a ratio is the median of the rounds' own.
"""

from __future__ import annotations

import argparse
import array
import contextlib
import gc
import importlib
import statistics
import threading
from collections import defaultdict
from pathlib import Path
from time import perf_counter_ns, thread_time_ns
from typing import TYPE_CHECKING, Any, Final

import otel_npu
from benchmarks.comparing import cpu_ns, median, serve, subjects
from benchmarks.step_picture import Bar, draw

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks.comparing import Subject

STAGES: Final = ("prepare_input", "forward", "post_process", "sample", "bookkeep", "eplb")
DEVICES: Final = ("cpu", "npu")
_HOT_STEPS, _COLD_STEPS = 512, 32

# Functions of the hot path that a step passes through, by what they do. Of several the first that a revision has.
INSIDE: Final[dict[str, tuple[str, ...]]] = {
    "resolve": ("otel_npu.capture.resolver:Resolver.resolve",),
    "read the device's times": ("otel_npu.capture.resolver:Resolver._read",),
    "make the frame": ("otel_npu.capture.resolver:Resolver._frame", "otel_npu.capture.resolver:Resolver._pack"),
    "encode": ("otel_npu.wire.frames:encode",),
    "queue and lock of the channel": ("otel_npu.wire.channel:Channel.send",),
    "the kernel's send": ("otel_npu.wire.channel:_send",),
}
PARTS: Final = ("open", "first stage", "further stages", "close", *INSIDE)


class Steps:
    """Runs steps in the process of one revision, and times them.

    Args:
        device: `cpu` or `npu`.
    """

    def __init__(self, device: str) -> None:
        if device == "npu":
            self._load_npu()
        otel_npu.enable(otel_npu.Settings(device=device))
        self._numbers = array.array("q", range(4_000_000))
        self._objects: list[dict[str, Any]] = [{str(index): index, "a": [index]} for index in range(200_000)]
        gc.freeze()  # they are nothing for the collector, which goes on as ever
        self._step()

    def _load_npu(self) -> None:
        with contextlib.suppress(ImportError):  # an installation without the tests: then there must be an NPU
            from tests.helpers.ascend.simulator import Simulator

            Simulator.load()
        import torch
        import torch_npu  # noqa: F401

        torch.npu.set_device(0)
        torch.npu.synchronize()

    def answer(self, *, kind: str, cold: bool) -> dict[str, float]:
        """Microseconds a step, of a block of steps: as a whole, or by part."""
        steps = _COLD_STEPS if cold else _HOT_STEPS
        if kind == "parts":
            with _timed_inside() as clock:
                for number in range(steps):
                    self._cool(number, cold=cold)
                    self._step_by_part(clock)
            return {part: ns / steps / 1000 for part, ns in clock.costs.items()}
        own = ours = 0
        before = _our_threads_ns()
        for number in range(steps):
            self._cool(number, cold=cold)
            began = thread_time_ns()
            self._step()
            own += thread_time_ns() - began
        ours = _our_threads_ns() - before
        return {"own": own / steps / 1000, "ours": ours / steps / 1000, "steps": steps}

    def _cool(self, number: int, *, cold: bool) -> None:
        if cold:
            sum(self._numbers[number % 7 :: 5])
            [each["a"] for each in self._objects]

    def _step(self) -> None:
        stage = otel_npu.stage
        with otel_npu.step("decode"):
            for name in STAGES:
                with stage(name):
                    pass

    def _step_by_part(self, clock: _Clock) -> None:
        with clock.part("open"):
            step = otel_npu.step("decode").open()
        for name in STAGES:
            with clock.part("first stage" if name is STAGES[0] else "further stages"), otel_npu.stage(name):
                pass
        with clock.part("close"):
            step.close()


class _Clock:
    """Adds up what each part takes by itself, without the parts inside it; of one thread."""

    def __init__(self) -> None:
        self.costs: dict[str, int] = defaultdict(int)
        self._inside: list[int] = []
        self._thread = threading.get_ident()

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._inside.append(0)
        began = perf_counter_ns()
        try:
            yield
        finally:
            took = perf_counter_ns() - began
            self.costs[name] += took - self._inside.pop()
            if self._inside:
                self._inside[-1] += took

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function; what it takes on this thread is added to the part."""
        self.costs[name] = 0

        def call(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != self._thread:
                return function(*args, **kwargs)
            with self.part(name):
                return function(*args, **kwargs)

        return call


@contextlib.contextmanager
def _timed_inside() -> Iterator[_Clock]:
    """Time the functions inside as well, those that this revision has."""
    clock = _Clock()
    with contextlib.ExitStack() as restored:
        for part, targets in INSIDE.items():
            for target in targets:
                with contextlib.suppress(ImportError, AttributeError):
                    module, _, path = target.partition(":")
                    *owners, name = path.split(".")
                    owner = importlib.import_module(module)
                    for each in owners:
                        owner = getattr(owner, each)
                    function = getattr(owner, name)
                    setattr(owner, name, clock.timed(part, function))
                    restored.callback(setattr, owner, name, function)
                    break
        yield clock


def _our_threads_ns() -> int:
    ours = (thread for thread in threading.enumerate() if thread.name.startswith("otel-npu"))
    return cpu_ns(Path(f"/proc/self/task/{thread.native_id}") for thread in ours)


def measure(subjects: list[Subject], rounds: int, show: Callable[[str], None]) -> dict[str, Any]:
    """Samples of each revision, round by round: whole steps hot and cold, then parts."""
    samples: dict[str, Any] = {subject.name: defaultdict(list) for subject in subjects}
    parts: dict[str, Any] = {subject.name: defaultdict(list) for subject in subjects}
    for number in range(rounds + 1):
        for subject in subjects if number % 2 else reversed(subjects):
            for cold in (False, True):
                relay_ns = subject.relay_ns()
                block = subject.ask(kind="whole", cold=cold)
                relay_us = (subject.relay_ns() - relay_ns) / block["steps"] / 1000
                by_part = subject.ask(kind="parts", cold=cold)
                if number:  # the first round wakes everything up
                    caches = "cold" if cold else "hot"
                    samples[subject.name][caches].append(block["own"])
                    samples[subject.name][f"{caches}, our other threads"].append(block["ours"])
                    samples[subject.name][f"{caches}, relay"].append(relay_us)
                    parts[subject.name][caches].append(by_part)
        show(f"\r  round {number} of {rounds}")
    show("\r" + " " * 40 + "\r")
    return {"samples": samples, "parts": parts}


def report(device: str, names: list[str], measured: dict[str, Any]) -> list[Bar]:
    """Print the tables of one device; gives where the time of its cold steps goes."""
    samples, parts = measured["samples"], measured["parts"]
    print(f"\n{device}: us of processor time a step of {len(STAGES)} stages, median of blocks (95 % interval)")
    print(_row("", *names, *["ratio"][: len(names) - 1]))
    for what in samples[names[0]]:
        cells = [str(median(samples[name][what])) for name in names]
        if len(names) > 1 and what in ("hot", "cold"):
            pairs = zip(samples[names[1]][what], samples[names[0]][what], strict=True)
            cells.append(str(median([now / then for now, then in pairs])))
        print(_row(what, *cells))
    print("by part, each without those inside it; timing them adds some us, which stand where they arise")
    columns = [(name, caches) for caches in ("hot", "cold") for name in names]
    print(_row("", *(f"{name}, {caches}" for name, caches in columns)))
    for part in PARTS:
        values = [_part(parts[name][caches], part) for name, caches in columns]
        print(_row(part, *("not available" if value is None else f"{value:.1f}" for value in values)))
    return [
        Bar(
            f"{device}, {name}",
            median(samples[name]["cold"]).value,
            {part: _part(parts[name]["cold"], part) or 0.0 for part in PARTS},
        )
        for name in names
    ]


def _part(blocks: list[dict[str, float]], part: str) -> float | None:
    return statistics.median(block[part] for block in blocks) if part in blocks[0] else None


def _row(title: str, *cells: str) -> str:
    return f"  {title:<32}" + "".join(f"{cell:>28}" for cell in cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", metavar="REVISION", help="a revision of git to compare with, such as 6177d3b")
    parser.add_argument("--rounds", type=int, default=20, help="blocks of each kind (default: 20)")
    parser.add_argument("--devices", nargs="+", choices=DEVICES, default=DEVICES)
    parser.add_argument("--picture", type=Path, metavar="FILE.svg", help="draw where the time of a cold step goes")
    parser.add_argument("--serve", choices=DEVICES, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.serve:
        serve(lambda: Steps(chosen.serve).answer)
    bars: list[Bar] = []
    for device in chosen.devices:
        with subjects("benchmarks.step_cost", ["--serve", device], {"TASK_QUEUE_ENABLE": "1"}, chosen.against) as both:
            measured = measure(both, chosen.rounds, lambda text: print(text, end="", flush=True))
            bars += report(device, [subject.name for subject in both], measured)
    if chosen.picture:
        draw(bars, chosen.picture)


if __name__ == "__main__":
    main()
