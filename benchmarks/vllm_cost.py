"""What tracing costs vLLM's real server. Prints throughput ratios with their 95 % intervals, and host time a step.

Needs vLLM, as `make test` installs it on x86-64 with Python 3.11. Run from the repository, on an idle machine:

    python -m benchmarks.vllm_cost [--pairs 200] [--starts 4] [--off]

Three servers with a tiny model run side by side: one with otel-npu on and two without it, all with vLLM's own tracing.
They take turns at short rounds of requests, in an order that changes each time, so that a slower moment of the machine
slows all of them; while one has its turn the others are stopped, with their relay. The ratio of the two without it
(A/A) says how much of a difference is the method's own; the ratio to both of them together is the surest. Two starts
of the same server are not equally fast: so all are started several times, each time in another order.

A tiny model on a CPU makes steps of about a millisecond, all of it on the host. On a device a step takes longer, and
meanwhile the host waits: `--device-ms` says how long. With 0 everything that any process does is in the others' way on
a small machine, the client's own work and the relay's too.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent import futures
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc

from benchmarks.vllm_timed_steps import DEVICE_MS, ENGINE, FOLDER, WORKER, totals
from tests.helpers.tiny_model import words
from tests.helpers.vllm_client import Client
from tests.helpers.vllm_server import ROOMY, Server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CONCURRENCY = 8
NAMES = ("on", "off", "off-again")
WARM_UP_ROUNDS = 10


@dataclass
class Figures:
    """What rounds took."""

    tokens_per_second: list[float] = field(default_factory=list)
    worker_us: list[float] = field(default_factory=list)
    engine_us: list[float] = field(default_factory=list)

    def add(self, more: Figures) -> None:
        """Those of other rounds, too."""
        self.tokens_per_second += more.tokens_per_second
        self.worker_us += more.worker_us
        self.engine_us += more.engine_us


@dataclass
class Measured:
    """A server, and what its rounds took."""

    server: Server
    figures: Figures = field(default_factory=Figures)

    def __post_init__(self) -> None:
        self._pids = [*self.server.processes(), *self.server.relays()]
        self._signal(signal.SIGSTOP)

    def round(self, pool: futures.Executor, requests: int, tokens: int) -> None:
        """Time one round of requests. One of each client goes before it, untimed: to wake up takes time."""
        self._signal(signal.SIGCONT)
        self._ask_all(pool, 1, tokens)
        before = self._totals()
        began = time.perf_counter()
        self._ask_all(pool, requests // CONCURRENCY, tokens)
        self.figures.tokens_per_second.append(requests * tokens / (time.perf_counter() - began))
        for costs, (ns, steps), (ns_before, steps_before) in zip(
            (self.figures.worker_us, self.figures.engine_us), self._totals(), before, strict=True
        ):
            costs.append((ns - ns_before) / (steps - steps_before) / 1000)
        self._signal(signal.SIGSTOP)

    def forget(self) -> None:
        """Leave out what was measured so far."""
        self.figures = Figures()

    def go_on(self) -> None:
        """It can be ended again."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        for pid in self._pids:
            os.kill(pid, number)

    def _totals(self) -> list[tuple[int, int]]:
        return [totals(self.server.folder, role) for role in (WORKER, ENGINE)]

    def _ask_all(self, pool: futures.Executor, requests: int, tokens: int) -> None:
        list(pool.map(lambda place: self._ask(requests, tokens, place), range(CONCURRENCY)))

    def _ask(self, requests: int, tokens: int, place: int) -> None:
        connections: dict[int, http.client.HTTPConnection] = _thread.__dict__.setdefault("connections", {})
        connection = connections.setdefault(
            self.server.port, http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=60)
        )
        body = {"model": "tiny", "prompt": words(20, 30 * place), "max_tokens": tokens, "ignore_eos": True}
        for _ in range(requests):
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            answer = json.loads(connection.getresponse().read())
            assert answer["usage"]["completion_tokens"] == tokens


_thread = threading.local()


@contextlib.contextmanager
def sink() -> Iterator[str]:
    """A receiver that takes spans unread; its endpoint."""

    class Handler(grpc.GenericRpcHandler):  # type: ignore[misc, unused-ignore]
        def service(self, _: Any) -> Any:
            return grpc.unary_unary_rpc_method_handler(lambda _request, _context: b"")

    server = grpc.server(futures.ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers((Handler(),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.stop(grace=None).wait()


@contextlib.contextmanager
def servers(
    endpoint: str, folder: Path, device_ms: float, *, off: bool = False, start: int = 0
) -> Iterator[list[Measured]]:
    """One with otel-npu, maybe switched off again, then two without. The one with it is not always started first."""
    with contextlib.ExitStack() as running:
        measured: dict[str, Measured] = {}
        for name in NAMES[-start % len(NAMES) :] + NAMES[: -start % len(NAMES)]:
            enabled = "1" if name == "on" else "0"
            own = folder / name
            own.mkdir()
            server = Server(
                own,
                [*ROOMY, "--otlp-traces-endpoint", endpoint, "--disable-uvicorn-access-log"],
                {
                    "OTEL_NPU_ENABLED": enabled,
                    "OTEL_BSP_SCHEDULE_DELAY": None,
                    "OMP_NUM_THREADS": "1",
                    "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "3600",
                    FOLDER: str(own),
                    DEVICE_MS: str(device_ms),
                },
                {"timed_steps": "benchmarks.vllm_timed_steps:register"},
            )
            running.enter_context(server)
            if off and name == "on":
                _switch_off(server)
            measured[name] = Measured(server)
            running.callback(measured[name].go_on)
        yield [measured[name] for name in NAMES]


def _switch_off(server: Server) -> None:
    """As somebody beside it would, once all its processes trace: the front end does from its first request on."""
    Client(server.port).complete(words(20), max_tokens=4)
    command = [str(Path(sys.executable).with_name("otel-npu")), "off", "--pid", str(server.processes()[0])]
    subprocess.run(command, check=True)  # noqa: S603


def interval(samples: list[float]) -> tuple[float, float, float]:
    """Mean, and the ends of its 95 % interval."""
    mean = statistics.fmean(samples)
    half = 1.96 * statistics.stdev(samples) / math.sqrt(len(samples))
    return mean, mean - half, mean + half


def ratio(one: list[float], other: list[float]) -> str:
    """The geometric mean of the pairs' ratios."""
    logs = [math.log(a / b) for a, b in zip(one, other, strict=True)]
    mean, low, high = map(math.exp, interval(logs))
    return f"{mean:.4f}   95 % interval {low:.4f} .. {high:.4f}"


def added(one: list[float], other: list[float]) -> str:
    """The mean of the pairs' differences."""
    mean, low, high = interval([a - b for a, b in zip(one, other, strict=True)])
    return f"{mean:+7.1f} us   95 % interval {low:+.1f} .. {high:+.1f}, of {statistics.fmean(other):.0f} us"


def measure(measured: list[Measured], pairs: int, requests: int, tokens: int, show: Callable[[str], None]) -> None:
    """Let the servers take turns."""
    with futures.ThreadPoolExecutor(CONCURRENCY) as pool:
        warm_up = min(WARM_UP_ROUNDS, pairs)
        for number in range(warm_up + pairs):
            if number == warm_up:
                for one in measured:
                    one.forget()
            turn = number % len(measured)
            order = measured[turn:] + measured[:turn]
            for one in order if number // len(measured) % 2 else reversed(order):
                one.round(pool, requests, tokens)
            if number % 20 == 0:
                show(f"\r{max(0, number - warm_up)} of {pairs} pairs")
    show("\r" + " " * 40 + "\r")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--starts", type=int, default=4, help="how often the servers are started anew meanwhile")
    parser.add_argument("--requests", type=int, default=16, help="requests a round")
    parser.add_argument("--tokens", type=int, default=16, help="output tokens a request")
    parser.add_argument("--device-ms", type=float, default=10.0, help="how long the device works on a step")
    parser.add_argument("--off", action="store_true", help="the server with otel-npu has been told `otel-npu off`")
    chosen = parser.parse_args()
    show: Callable[[str], None] = lambda text: print(text, end="", flush=True)  # noqa: E731
    on, off, again = totals = Figures(), Figures(), Figures()
    for start in range(chosen.starts):
        show(f"starting three servers, {start + 1} of {chosen.starts} times: half a minute ...")
        with (
            tempfile.TemporaryDirectory() as folder,
            sink() as endpoint,
            servers(endpoint, Path(folder), chosen.device_ms, off=chosen.off, start=start) as measured,
        ):
            pairs = (chosen.pairs * (start + 1)) // chosen.starts - (chosen.pairs * start) // chosen.starts
            measure(measured, pairs, chosen.requests, chosen.tokens, show)
        for total, one in zip(totals, measured, strict=True):
            total.add(one.figures)
    if chosen.off:
        print("the server called `on` was switched off by `otel-npu off`")
    print(
        f"{chosen.pairs} pairs of rounds of {chosen.requests} requests of {chosen.tokens} tokens, "
        f"{CONCURRENCY} at once, in {chosen.starts} starts"
    )
    print(f"{chosen.device_ms:g} ms a step on the device")
    print(f"without otel-npu: {statistics.fmean(off.tokens_per_second):.0f} tokens/s")
    print(f"throughput, on/off:  {ratio(on.tokens_per_second, off.tokens_per_second)}")
    both = [math.sqrt(one * other) for one, other in zip(off.tokens_per_second, again.tokens_per_second, strict=True)]
    print(f"throughput, on/both: {ratio(on.tokens_per_second, both)}")
    print(f"throughput, off/off: {ratio(again.tokens_per_second, off.tokens_per_second)}")
    print(f"a step in the worker, on - off:   {added(on.worker_us, off.worker_us)}")
    print(f"a step in the worker, off - off:  {added(again.worker_us, off.worker_us)}")
    print(f"a step in EngineCore, on - off:   {added(on.engine_us, off.engine_us)}")
    print(f"a step in EngineCore, off - off:  {added(again.engine_us, off.engine_us)}")


if __name__ == "__main__":
    main()
