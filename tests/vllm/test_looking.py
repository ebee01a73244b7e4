"""vLLM's real server of two ranks, looked at while it serves, and switched on and off: it begins in standby."""

from __future__ import annotations

import contextlib
import functools
import json
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from otel_npu import semconv
from otel_npu.looking import otlp_json
from otel_npu.looking.model import Model
from otel_npu.looking.session import connect
from otel_npu.wire import frames
from otel_npu.wire.looking import Seen
from tests.helpers.command_line import otel_npu_command
from tests.helpers.receiver import Receiver
from tests.helpers.tiny_model import words
from tests.helpers.traced import eventually
from tests.helpers.vllm_client import Caller, Client
from tests.helpers.vllm_server import ROOMY, Server, needs_vllm
from tests.helpers.vllm_spans import LLM_REQUEST, Spans, assert_consistent, assert_phases, request_in

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Iterator

pytestmark = [pytest.mark.slow, needs_vllm]

SESSION = "looked-at"
RANKS = 2
PROCESSES = {"front end", "engine", *range(RANKS)}
CLIENTS = 3


@dataclass
class Standing:
    """A server, its client and the receiver of its spans."""

    server: Server
    client: Client
    receiver: Receiver

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """A command of ours beside it."""
        environment = {"XDG_RUNTIME_DIR": str(self.server.folder / "run")}
        return otel_npu_command(*arguments, "--session", SESSION, environment=environment)

    def status(self) -> list[dict[str, Any]]:
        """Its processes."""
        found: list[dict[str, Any]] = json.loads(self.command("status", "--json").stdout)["processes"]
        return found


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Standing]:
    environment = {
        "OTEL_NPU_ENABLED": "standby",
        "OTEL_NPU_SESSION": SESSION,
        "OTEL_NPU_STEPS_PER_SECOND": "all",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    with Receiver() as receiver:
        arguments = [*ROOMY, "--otlp-traces-endpoint", f"http://127.0.0.1:{receiver.grpc_port}"]
        folder = tmp_path_factory.mktemp("standing")
        with Server(folder, [*arguments, "--tensor-parallel-size", str(RANKS)], environment) as server:
            yield Standing(server, Client(server.port), receiver)


@contextlib.contextmanager
def load(client: Client) -> Iterator[Callable[[], int]]:
    """Requests without a pause; gives how many were answered."""
    done, answered = threading.Event(), [0] * CLIENTS
    failures: list[BaseException] = []

    def ask(number: int) -> None:
        try:
            while not done.is_set():
                client.complete(words(10 + number), Caller().headers(), max_tokens=30)
                answered[number] += 1
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    try:
        eventually(lambda: failures or all(answered), "requests are answered")
        yield lambda: sum(answered)
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert failures == []


def test_in_standby_it_has_no_spans_of_ours_and_has_them_once_it_is_switched_on(standing: Standing) -> None:
    standing.client.complete(words(5))
    standing.receiver.wait_for(1, LLM_REQUEST)
    assert [process["on"] for process in standing.status()] == [False] * len(PROCESSES)
    assert Spans(standing.receiver.spans).ours == []

    on = standing.command("on")
    assert on.stdout == f"capture is on in session {SESSION}, in all its {len(PROCESSES)} processes\n"
    began = time.monotonic()
    caller = Caller()
    standing.client.complete(words(5), caller.headers())
    standing.receiver.wait_for(1, semconv.WORKER_STEP + " rank 1")
    print(f"the first span {time.monotonic() - began:.1f} s after `on`")  # noqa: T201
    spans, request = request_in(standing.receiver, caller.trace_id)
    assert_phases(spans, request)


def test_top_agrees_with_what_the_server_counts(standing: Standing) -> None:
    """To 5 %, while it serves, at one look of ten at least: on a busy machine the server tells late what it counts."""

    def counts() -> tuple[float, int, int]:
        client = standing.client
        steps = client.counted("iteration_tokens", "total_count")
        return time.time(), steps, client.counted("prompt_tokens") + client.counted("generation_tokens")

    def differences() -> list[float]:
        readings, done = [counts()], threading.Event()

        def read() -> None:
            while not done.wait(0.05):
                readings.append(counts())

        reader = threading.Thread(target=read)
        reader.start()
        looked = standing.command("top", "--once", "--json")
        done.set()
        reader.join()
        found = json.loads(looked.stdout)
        last = min(readings, key=lambda reading: abs(reading[0] - found["until"]))
        first = min(readings, key=lambda reading: abs(reading[0] - (found["until"] - found["seconds"])))
        took = last[0] - first[0]
        steps = sum(found["steps_per_second"].values()) / ((last[1] - first[1]) / took)
        tokens = found["tokens_per_second"] / ((last[2] - first[2]) / took)
        print(f"top, of what the server counts: {steps:.3f} of its steps, {tokens:.3f} of its tokens")  # noqa: T201
        return [abs(steps - 1), abs(tokens - 1)]

    with load(standing.client):
        assert any(max(differences()) < 0.05 for _ in range(10))


def test_a_recording_holds_every_step_that_the_engine_counts_with_all_its_ranks(standing: Standing) -> None:
    """Until one holds a request too: on a busy machine a step may take half a second."""
    path = standing.server.folder / "recorded.json"
    counted = functools.partial(standing.client.counted, "iteration_tokens", "total_count")
    with load(standing.client):
        for seconds in (3, 15, 75):
            before = counted()
            done = standing.command("record", "--seconds", str(seconds), "-o", str(path))
            most = counted() - before
            assert done.returncode == 0, done.stderr
            print(done.stdout)  # noqa: T201
            model = Model(otlp_json.read(path))
            if model.requests:
                break
    numbers = [step.attributes[semconv.STEP_NUMBER] for step in model.steps]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    assert len(numbers) <= most
    assert all(sorted(str(run.rank) for run in step.runs) == ["0", "1"] for step in model.steps)
    assert model.requests


def test_off_under_load_leaves_nothing_open_and_nothing_broken(standing: Standing) -> None:
    with load(standing.client) as answered:
        eventually(open_requests, "requests are under way")
        off = standing.command("off")
        assert off.returncode == 0, off.stderr
        so_many = answered()
        eventually(lambda: answered() >= so_many + 2 * CLIENTS, "the server goes on")
    eventually(lambda: not open_requests(), "no request is open in the relay")
    assert {process["on"] for process in standing.status()} == {False}
    spans = Spans(standing.receiver.spans)
    standing.client.complete(words(5))
    assert "Traceback" not in standing.server.log
    standing.server.stop()
    after = Spans(standing.receiver.spans)
    assert len(after.ours) == len(spans.ours)
    assert_consistent(after)


def open_requests() -> list[frames.Request]:
    """The requests that the relay holds as under way: whoever begins to follow is told of them."""
    with connect(SESSION) as looks:
        looks.ask(follow=True)
        packets = [bytes(view.packet) for view in looks.views(0.0) if isinstance(view, Seen)]
    told = [frames.decode_frame(frame) for packet in packets for frame in frames.frames_in(packet)]
    return [frame for frame in told if isinstance(frame, frames.Request)]
