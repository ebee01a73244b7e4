"""Compares this working tree with another revision in one run: each in a process of its own, measured by turns.

A benchmark's module serves in both processes (`serve`), and asks them for blocks of measurements (`Subject.ask`). The
code that measures is this tree's in both; `otel_npu` alone is the other revision's.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, NoReturn

import otel_npu
from tests.helpers import REPOSITORY
from tests.helpers.traced import eventually, relays

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

BEFORE: Final = "6177d3b"
"""The revision that the goals of a step's price count from."""


class Subject:
    """One revision, measured in a process of its own.

    Args:
        name: What tables call it.
        module: The benchmark's module, whose `serve()` answers.
        folder: Where its `otel_npu` lies.
        arguments: What the module is to measure.
        environment: What its environment holds beside the usual.
    """

    def __init__(
        self, name: str, module: str, folder: Path, arguments: Sequence[str], environment: Mapping[str, str]
    ) -> None:
        self.name = name
        self._own = tempfile.mkdtemp(prefix="bench-")
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("OTEL_", "VLLM_"))}
        self._process = subprocess.Popen(  # noqa: S603
            [sys.executable, "-W", "ignore", "-m", module, *arguments],
            cwd=folder,
            env={
                **inherited,
                "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
                "OTEL_TRACES_EXPORTER": "none",
                **environment,
                "PYTHONPATH": os.pathsep.join((str(folder), environment.get("PYTHONPATH", str(REPOSITORY)))),
                "XDG_RUNTIME_DIR": self._own,
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, **what: Any) -> Any:
        """The answer of `serve`'s function to these arguments.

        Raises:
            RuntimeError: The process has ended; what went wrong is on stderr.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the process that measures {self.name} has ended: {self._process.wait()}")
        return json.loads(answer)

    def relay_ns(self) -> int:
        """Processor time of its relay so far, in nanoseconds."""
        return sum(cpu_ns(Path(f"/proc/{pid}/task").iterdir()) for pid in relays(Path(self._own)))

    def close(self) -> None:
        """End it, and remove what it left."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        eventually(lambda: not relays(Path(self._own)), "the relay has ended", 30)
        shutil.rmtree(self._own)


def serve(start: Callable[[], Callable[..., Any]]) -> NoReturn:
    """Answer what a `Subject` is asked, until nobody asks any more. Whatever else is printed goes to stderr.

    Args:
        start: Called once, for the function that answers.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    answer = start()
    for line in sys.stdin:
        answers.write(json.dumps(answer(**json.loads(line))) + "\n")
        answers.flush()
    otel_npu.disable()
    os._exit(0)  # not through torch_npu's own exit: the runtime behind it is simulated


@contextlib.contextmanager
def subjects(
    module: str,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    against: str | None,
    beside: tuple[str, Mapping[str, str]] | None = None,
) -> Iterator[list[Subject]]:
    """This tree; before it the revision that it is measured against, after it itself in another environment."""
    with contextlib.ExitStack() as running:
        trees: list[tuple[str, Path, Mapping[str, str]]] = [("this tree", REPOSITORY, {})]
        if against:
            trees.insert(0, (against, running.enter_context(_checkout(against)), {}))
        if beside:
            trees.append((beside[0], REPOSITORY, beside[1]))
        started = []
        for name, folder, more in trees:
            started.append(Subject(name, module, folder, arguments, {**environment, **more}))
            running.callback(started[-1].close)
        yield started


@contextlib.contextmanager
def _checkout(revision: str) -> Iterator[Path]:
    """A folder with another revision's `otel_npu`."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        archive = subprocess.run(  # noqa: S603
            ["git", "archive", revision, "otel_npu"],  # noqa: S607
            cwd=REPOSITORY,
            capture_output=True,
            check=True,
        )
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)  # noqa: S603, S607
        yield Path(folder)


def cpu_ns(threads: Iterable[Path]) -> int:
    """Processor time of threads so far, in nanoseconds; each by its folder in /proc."""
    total = 0
    for thread in threads:
        with contextlib.suppress(OSError):  # it has ended
            total += int((thread / "schedstat").read_text().split()[0])
    return total


class Interval(NamedTuple):
    """A figure, and the ends of its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        digits = 3 if abs(self.value) < 10 else 1
        return f"{self.value:.{digits}f} ({self.low:.{digits}f} .. {self.high:.{digits}f})"


def median(samples: Sequence[float]) -> Interval:
    """The median, and its interval by order: it takes no shape of the noise for granted."""
    ordered = sorted(samples)
    half = 0.98 * math.sqrt(len(ordered))
    low = max(0, math.floor(len(ordered) / 2 - half))
    high = min(len(ordered) - 1, math.ceil(len(ordered) / 2 + half))
    return Interval(statistics.median(ordered), ordered[low], ordered[high])


def ratio_of_medians(one: Sequence[float], other: Sequence[float]) -> Interval:
    """Of samples taken by turns, each of which may be near zero or below: the rounds are drawn again and again."""
    draw = random.Random(1)  # noqa: S311 - the same interval for the same samples
    rounds = range(len(one))
    ratios = []
    for _ in range(2000):
        drawn = draw.choices(rounds, k=len(rounds))
        below = statistics.median(other[index] for index in drawn)
        if below:
            ratios.append(statistics.median(one[index] for index in drawn) / below)
    ratios.sort()
    value = statistics.median(one) / statistics.median(other)
    return Interval(value, ratios[len(ratios) * 25 // 1000], ratios[len(ratios) * 975 // 1000])
