"""What tracing adds to a step of the real vLLM worker and EngineCore, switched on and off in one process.

Needs vLLM, as `make test` installs it on x86-64 with Python 3.11. Run from the repository:

    python -m benchmarks.vllm_step_cost [--against REVISION | --metrics]

All of vLLM runs in one process with a tiny model and serves eight sampled requests at once. While they decode, blocks
of steps with our hooks in place take turns with blocks without them. The two blocks of a pair stand next to each other
in time, and their difference does not see what the machine does otherwise: two servers side by side
(`benchmarks.vllm_cost`) can't tell less than 2 %.

The worker's share is what `execute_model` and `sample_tokens` take, EngineCore's what the scheduler's three methods
take, each as processor time of the thread and as time on the wall. "All threads" is the whole process's processor
time, with what tracing does on threads of its own. `--device-ms` is how long a device would work on a step: counted
from the forward, and waited for where vLLM waits for the sampled tokens, as on a device.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import sys
import tempfile
from collections import defaultdict
from importlib.metadata import entry_points
from pathlib import Path
from time import perf_counter_ns, process_time_ns, sleep, thread_time_ns
from typing import TYPE_CHECKING, Any, Final

from benchmarks.comparing import median, ratio_of_medians, serve, subjects
from tests.helpers.tiny_model import CONTEXT, tiny_model, words
from tests.helpers.vllm_server import free_port, vllm_environment

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.comparing import Subject

REQUESTS: Final = 8
PAIRS: Final = 4  # of blocks, while the same requests decode
_PROMPT_TOKENS: Final = 20
_FIRST_STEPS: Final = 4

_MODULES: Final = (  # imported first, so that what is hooked into them can be taken out again
    "vllm.v1.engine.llm_engine",
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.core",
    "vllm.v1.core.sched.scheduler",
    "vllm.v1.core.sched.async_scheduler",
    "vllm.v1.executor.uniproc_executor",
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.worker.cpu_model_runner",
    "vllm.v1.worker.gpu_worker",
    "vllm.v1.worker.gpu_model_runner",
    "vllm.v1.worker.gpu.model_runner",
    "vllm.v1.sample.sampler",
    "vllm.entrypoints.llm",
)
_MISSING: Final = object()

FIGURES: Final = {
    "worker_cpu": "worker, processor time",
    "worker_wall": "worker, time on the wall",
    "engine_cpu": "EngineCore, processor time",
    "engine_wall": "EngineCore, time on the wall",
    "loop_wall": "a whole step, time on the wall",
    "process_cpu": "all threads, processor time",
}


class Hooks:
    """Whatever otel-npu's plugin puts into vLLM, put in and taken out again."""

    def __init__(self) -> None:
        for name in _MODULES:
            importlib.import_module(name)
        before = {id(owner): dict(vars(owner)) for owner in _owners()}
        (plugin,) = entry_points(group="vllm.general_plugins", name="otel_npu")
        plugin.load()()
        self._hooked = [
            (owner, name, before[id(owner)].get(name, _MISSING), value)
            for owner in _owners()
            if id(owner) in before
            for name, value in dict(vars(owner)).items()
            if before[id(owner)].get(name, _MISSING) is not value
        ]
        assert self._hooked, "the plugin has hooked nothing"

    def include(self, instance: Any) -> None:
        """This object's methods have been replaced on the object itself."""
        for name, value in list(vars(instance).items()):
            if callable(getattr(type(instance), name, None)):
                self._hooked.append((instance, name, _MISSING, value))

    def switch(self, *, on: bool) -> None:
        """Put them in, or take them out."""
        for index, (owner, name, original, hooked) in enumerate(self._hooked):
            if on:
                setattr(owner, name, hooked)
            else:
                self._hooked[index] = (owner, name, original, getattr(owner, name))  # a slot may have been filled
                if original is _MISSING:
                    delattr(owner, name)
                else:
                    setattr(owner, name, original)


def _owners() -> list[Any]:
    """VLLM's modules and classes."""
    modules = [module for name, module in list(sys.modules.items()) if name.split(".")[0] == "vllm" and module]
    classes = [
        value
        for module in modules
        for value in list(vars(module).values())
        if isinstance(value, type) and value.__module__ == module.__name__
    ]
    return [*modules, *classes]


class Engine:
    """All of vLLM in this process, and its steps timed from outside of all hooks.

    Args:
        device_ms: How long a device would work on each step.
        steps: Steps a block.
    """

    def __init__(self, device_ms: float, steps: int) -> None:
        hooks = Hooks()
        from vllm import LLM, SamplingParams

        self._totals: dict[str, int] = defaultdict(int)
        self._steps = steps
        self._batches = 0
        self._time_the_worker(round(device_ms * 1e6))
        self._parameters = SamplingParams(
            max_tokens=_FIRST_STEPS + 2 * PAIRS * steps + 1, ignore_eos=True, temperature=0
        )
        self._llm = LLM(
            str(tiny_model()),
            enforce_eager=True,
            max_model_len=CONTEXT,
            kv_cache_memory_bytes=64 << 20,
            enable_prefix_caching=False,
            disable_log_stats=True,
        )
        scheduler = self._llm.llm_engine.engine_core.engine_core.scheduler
        hooks.include(scheduler)
        self._scheduler = scheduler
        self._hooks = hooks
        gc.collect()
        gc.freeze()

    def answer(self) -> dict[str, list[dict[str, float]]]:
        """Microseconds a step, of pairs of blocks within one batch of requests, each without and with the hooks."""
        engine = self._llm.llm_engine
        self._batches += 1
        for number in range(REQUESTS):
            engine.add_request(
                f"{self._batches}-{number}",
                words(_PROMPT_TOKENS, 30 * number),
                self._parameters,
                trace_headers={"traceparent": f"00-{self._batches:032x}-{number + 1:016x}-01"},
            )
        for _ in range(_FIRST_STEPS):
            engine.step()
        blocks: dict[str, list[dict[str, float]]] = {"off": [], "on": []}
        for pair in range(PAIRS):
            for name in ("off", "on") if (pair + self._batches) % 2 else ("on", "off"):
                blocks[name].append(self._block(on=name == "on"))
        while engine.has_unfinished_requests():  # with the hooks: they hear of the end
            engine.step()
        return blocks

    def _block(self, *, on: bool) -> dict[str, float]:
        if not on:
            self._hooks.switch(on=False)
        restore = self._time_the_scheduler()
        self._totals.clear()
        before = process_time_ns()
        began = perf_counter_ns()
        for _ in range(self._steps):
            self._llm.llm_engine.step()
        wall = perf_counter_ns() - began
        cpu = process_time_ns() - before
        restore()
        if not on:
            self._hooks.switch(on=True)
        assert self._totals.pop("steps") == self._steps
        figures = {**self._totals, "loop_wall": wall, "process_cpu": cpu}
        return {name: ns / self._steps / 1000 for name, ns in figures.items()}

    def _time_the_worker(self, device_ns: int) -> None:
        from vllm.v1.worker.cpu_worker import CPUWorker
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner
        from vllm.v1.worker.gpu_worker import Worker

        totals, until = self._totals, 0
        slept: dict[str, int] = {"ns": 0}

        # They look it up at each call, so that whatever is put round it is inside.
        def execute_model(worker: Any, scheduler_output: Any) -> Any:
            totals["steps"] += bool(scheduler_output.total_num_scheduled_tokens)
            return Worker.execute_model(worker, scheduler_output)

        def sample_tokens(worker: Any, grammar_output: Any) -> Any:
            return Worker.sample_tokens(worker, grammar_output)

        CPUWorker.execute_model = _timed(execute_model, totals, "worker", slept)
        CPUWorker.sample_tokens = _timed(sample_tokens, totals, "worker", slept)
        if not device_ns:
            return
        forward = GPUModelRunner._model_forward
        bookkeep = GPUModelRunner._bookkeeping_sync

        def launch(runner: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal until
            output = forward(runner, *args, **kwargs)
            until = perf_counter_ns() + device_ns
            return output

        def wait(runner: Any, *args: Any, **kwargs: Any) -> Any:
            began = perf_counter_ns()
            sleep(max(0, until - began) * 1e-9)
            slept["ns"] += perf_counter_ns() - began
            return bookkeep(runner, *args, **kwargs)

        GPUModelRunner._model_forward = launch
        GPUModelRunner._bookkeeping_sync = wait

    def _time_the_scheduler(self) -> Callable[[], None]:
        """Round whatever is there now; gives what takes it away again."""
        scheduler = self._scheduler
        there = dict(vars(scheduler))
        names = ("add_request", "schedule", "update_from_output")
        for name in names:
            setattr(scheduler, name, _timed(getattr(scheduler, name), self._totals, "engine", {"ns": 0}))

        def restore() -> None:
            for name in names:
                if name in there:
                    setattr(scheduler, name, there[name])
                else:
                    delattr(scheduler, name)

        return restore


def _timed(function: Callable[..., Any], totals: dict[str, int], role: str, slept: dict[str, int]) -> Any:
    wall, cpu = f"{role}_wall", f"{role}_cpu"

    def call(*args: Any) -> Any:
        slept["ns"] = 0
        began, began_cpu = perf_counter_ns(), thread_time_ns()
        try:
            return function(*args)
        finally:
            totals[cpu] += thread_time_ns() - began_cpu
            totals[wall] += perf_counter_ns() - began - slept["ns"]

    return call


def measure(subjects: list[Subject], rounds: int, warm_up: int, show: Callable[[str], None]) -> dict[str, Any]:
    """Blocks of each revision, off and on, round by round."""
    blocks: dict[str, Any] = {subject.name: {"off": [], "on": []} for subject in subjects}
    for number in range(-warm_up, rounds):
        for subject in subjects if number % 2 else reversed(subjects):
            for name, measured in subject.ask().items():
                if number >= 0:
                    blocks[subject.name][name] += measured
        if number % 5 == 0:
            show(f"\r{max(number, 0)} of {rounds} rounds")
    show("\r" + " " * 40 + "\r")
    return blocks


def report(names: list[str], blocks: dict[str, Any], what: str) -> None:
    """Print the table."""
    print(f"us a step, {what}: median without, and median of what is added in pairs of blocks (95 % interval)")
    print(_row("", *(f"{name}: {cell}" for name in names for cell in ("off", "added")), *["ratio"][: len(names) - 1]))
    for figure, title in FIGURES.items():
        cells, added = [], []
        for name in names:
            off = [block[figure] for block in blocks[name]["off"]]
            on = [block[figure] for block in blocks[name]["on"]]
            added.append([with_it - without for with_it, without in zip(on, off, strict=True)])
            cells += [f"{median(off).value:.0f}", str(median(added[-1]))]
        if len(names) > 1:
            cells.append(str(ratio_of_medians(added[1], added[0])))
        print(_row(title, *cells))


def _row(title: str, *cells: str) -> str:
    return f"  {title:<32}" + "".join(f"{cell:>26}" for cell in cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", metavar="REVISION", help="a revision of git to compare with, such as 6177d3b")
    parser.add_argument("--metrics", action="store_true", help="compare with this tree with metrics on")
    parser.add_argument("--rounds", type=int, default=25, help=f"batches of {PAIRS} pairs of blocks (default: 25)")
    parser.add_argument("--steps", type=int, default=32, help="steps a block (default: 32)")
    parser.add_argument("--device-ms", type=float, default=0.0, help="how long a device works on a step (default: 0)")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.serve:
        serve(lambda: Engine(chosen.device_ms, chosen.steps).answer)
    arguments = ["--serve", "--device-ms", str(chosen.device_ms), "--steps", str(chosen.steps)]
    show: Callable[[str], None] = lambda text: print(text, end="", flush=True)  # noqa: E731
    show("starting vLLM: half a minute ...")
    tiny_model()  # it is made once, not by both
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        environment = {
            **vllm_environment(Path(folder)),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_PLUGINS": "",  # ours is loaded by hand
            "VLLM_LOGGING_LEVEL": "ERROR",
            "OMP_NUM_THREADS": "1",
        }
        metrics = {"OTEL_METRICS_EXPORTER": "prometheus", "OTEL_EXPORTER_PROMETHEUS_PORT": str(free_port())}
        beside = ("with metrics", metrics) if chosen.metrics else None
        with subjects("benchmarks.vllm_step_cost", arguments, environment, chosen.against, beside) as both:
            blocks = measure(both, chosen.rounds, 2, show)
    pairs = f"{chosen.rounds * PAIRS} pairs of {chosen.steps} steps"
    report([subject.name for subject in both], blocks, f"{pairs}, {chosen.device_ms:g} ms a step on the device")


if __name__ == "__main__":
    main()
