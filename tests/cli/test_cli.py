"""The command line, as a person or a container runs it."""

from __future__ import annotations

import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import otel_npu
from otel_npu.cli.demo.destination import Destination, name_service
from otel_npu.cli.demo.loop import InferenceLoop
from otel_npu.cli.demo.picture import _bar
from otel_npu.devices.simulated import SimulatedNpu
from tests.conftest import program

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from tests.helpers.receiver import Receiver

COMMAND = str(Path(sys.executable).with_name("otel-npu"))
STAGES = ["prepare_input", "forward", "attention", "mlp", "all_reduce", "post_process", "sample"]
STEPS = 30


def otel_npu_command(*arguments: str, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [COMMAND, *arguments],
        env={**os.environ, "PYTHONIOENCODING": "utf-8", **(environment or {})},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a command that goes on by itself; what still runs at the end of the test is killed."""
    running: list[subprocess.Popen[str]] = []

    def start(*arguments: str, environment: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [COMMAND, *arguments],
            env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        running.append(process)
        return process

    yield start
    for process in running:
        if process.poll() is None:
            process.kill()
        process.communicate()


def line_of(process: subprocess.Popen[str]) -> str:
    """The next line that the process prints, within 20 s."""
    assert process.stdout is not None
    assert select.select([process.stdout], [], [], 20)[0], "no line came"
    return process.stdout.readline()


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the demo prints where no endpoint is set."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    done = subprocess.run(
        [COMMAND, "demo", "--steps", str(STEPS)],
        env={**environment, "XDG_RUNTIME_DIR": str(tmp_path_factory.mktemp("run")), "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return done.stdout


def table(output: str) -> dict[str, dict[str, list[str]]]:
    """The figures of the demo's table, by kind of step and stage; those of the whole step stand under ``."""
    rows: dict[str, dict[str, list[str]]] = {}
    for line in output.partition("stage   ")[2].splitlines():
        name, *figures = line.split() or [""]
        if name in ("prefill", "decode"):
            rows[name] = {"": figures}
        elif name in STAGES:
            rows[next(reversed(rows))][name] = figures
    return rows


class TestDemo:
    def test_every_stage_of_every_step_is_in_the_table(self, shown: str) -> None:
        rows = table(shown)
        assert {kind: list(stages) for kind, stages in rows.items()} == {
            "prefill": ["", *STAGES],
            "decode": ["", *STAGES],
        }
        for stages in rows.values():
            assert len({figures[0] for figures in stages.values()}) == 1  # the same count
        assert sum(int(stages["forward"][0]) for stages in rows.values()) == STEPS
        _, p50, p99 = map(float, rows["decode"]["sample"][1:])
        assert p50 == pytest.approx(0.4, abs=0.05)
        assert p99 >= p50

    def test_a_prefill_a_decode_and_the_slow_step_are_drawn_with_their_stages(self, shown: str) -> None:
        drawn = shown.partition("was slow in")[0]
        assert re.findall(r"step \d+  (\w+),", drawn) == ["prefill", "decode", "decode"]
        for stage in STAGES:
            bars = re.findall(rf"^ +{stage} +([█▌▐▄▖▗]+) +[\d.]+$", drawn, re.MULTILINE)
            assert len(bars) == 3, stage

    def test_no_line_of_the_picture_is_wider_than_the_terminal(self, shown: str) -> None:
        assert max(map(len, shown.partition("was slow in")[0].splitlines()[:-1])) <= 80

    def test_the_slow_step_is_named_with_the_stage_that_made_it_slow(self, shown: str) -> None:
        found = re.search(
            r"Step (\d+), a decode, was slow in forward: .*, (\d\.\d) times as long; .* in all_reduce", shown
        )
        assert found is not None
        assert int(found[1]) == 18
        assert 4 < float(found[2]) < 8

    def test_without_an_endpoint_it_says_how_to_get_one(self, shown: str) -> None:
        assert f"All {STEPS * 8} spans came to this command over OTLP and went nowhere else" in shown
        assert "docker run --rm -p 16686:16686 -p 4317:4317 jaegertracing/jaeger:2.20.0" in shown
        # By the name or the path by which it can be called here.
        assert re.search(r"OTEL_EXPORTER_OTLP_ENDPOINT=http://localhost:4317 \S*otel-npu demo", shown)

    def test_without_a_terminal_there_are_no_control_characters(self, shown: str) -> None:
        assert all(character.isprintable() or character == "\n" for character in shown)

    def test_a_stream_without_block_characters_gets_plain_ones(self) -> None:
        done = otel_npu_command("demo", "--steps", "3", environment={"PYTHONIOENCODING": "ascii"})
        assert done.returncode == 0, done.stderr
        assert done.stdout.isascii()
        assert "=====" in done.stdout

    def test_where_there_is_no_room_for_bars_the_numbers_stay(self) -> None:
        done = otel_npu_command("demo", "--steps", "3", environment={"COLUMNS": "34"})
        assert done.returncode == 0, done.stderr
        assert len(re.findall(r"^    forward +\d+\.\d\d$", done.stdout, re.MULTILINE)) == 5  # 3 drawn, 2 in the table

    @pytest.mark.parametrize("protocol", ["grpc", "http"])
    def test_every_step_goes_to_the_endpoint_in_the_environment(self, receiver: Receiver, protocol: str) -> None:
        environment = receiver.grpc_environment if protocol == "grpc" else receiver.http_environment
        done = otel_npu_command("demo", "--steps", str(STEPS), environment=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        assert sorted(span.attributes["npu.step.number"] for span in receiver.named("worker_step")) == [
            *range(1, STEPS + 1)
        ]
        assert Counter(span.name for span in receiver.spans) == dict.fromkeys(["worker_step", *STAGES], STEPS)
        assert {span.resource["service.name"] for span in receiver.spans} == {"otel-npu-demo"}
        assert f"All {STEPS * 8} spans went to {environment['OTEL_EXPORTER_OTLP_ENDPOINT']}" in done.stdout
        assert sum(int(stages["forward"][0]) for stages in table(done.stdout).values()) == STEPS

    def test_an_endpoint_that_does_not_answer_is_an_error_that_names_it(self) -> None:
        with socket.socket() as taken:  # bound, not listening: nobody else gets the port
            taken.bind(("127.0.0.1", 0))
            endpoint = f"http://user:secret@127.0.0.1:{taken.getsockname()[1]}"
            done = otel_npu_command(
                "demo",
                "--steps",
                "3",
                environment={
                    "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint,
                    "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
                    "OTEL_EXPORTER_OTLP_TIMEOUT": "1",
                },
            )
        assert done.returncode == 1
        shown_endpoint = endpoint.replace("user:secret@", "")
        assert done.stdout.startswith(f"The spans could not be sent to {shown_endpoint} (http/protobuf).\n")
        assert "The exporter says:" in done.stdout
        assert "secret" not in done.stdout.splitlines()[0]
        assert "forward" not in done.stdout

    def test_an_endpoint_that_refuses_is_an_error_too(self, receiver: Receiver) -> None:
        receiver.refuse = True
        done = otel_npu_command("demo", "--steps", "3", environment=receiver.http_environment)
        assert done.returncode == 1
        assert "The spans could not be sent to" in done.stdout
        assert "403" in done.stdout

    def test_an_exporter_that_is_not_installed_is_an_error_that_says_what_is(self) -> None:
        done = otel_npu_command("demo", "--steps", "3", environment={"OTEL_TRACES_EXPORTER": "nonesuch"})
        assert done.returncode == 1
        assert "OTEL_TRACES_EXPORTER='nonesuch': takes " in done.stdout

    @pytest.mark.parametrize("steps", ["2", "0", "-5", "10001", "many"])
    def test_a_bad_number_of_steps_is_an_error_that_names_the_option(self, steps: str) -> None:
        done = otel_npu_command("demo", "--steps", steps)
        assert done.returncode == 2
        assert "Invalid value for '--steps'" in done.stderr

    def test_where_the_sdk_is_disabled_nothing_is_traced(self, receiver: Receiver) -> None:
        done = otel_npu_command(
            "demo", "--steps", "3", environment={**receiver.http_environment, "OTEL_SDK_DISABLED": "true"}
        )
        assert done.returncode == 1
        assert "OTEL_SDK_DISABLED=true" in done.stdout
        assert receiver.exports == 0

    def test_the_same_seed_gives_the_same_work(self) -> None:
        assert launched(seed=7) == launched(seed=7) != launched(seed=8)

    def test_nothing_is_left_behind_when_it_fails(self) -> None:
        otel_npu_command("demo", "--steps", "3", environment={"OTEL_TRACES_EXPORTER": "nonesuch"})
        assert not list(Path(os.environ["XDG_RUNTIME_DIR"]).rglob("*.sock"))


def launched(seed: int) -> list[int]:
    """The lengths of the kernels of three steps."""
    lengths: list[int] = []

    class Npu(SimulatedNpu):
        def launch(self, duration_ns: int) -> None:
            lengths.append(duration_ns)

    loop = InferenceLoop(Npu(), seed, 3)
    for _ in range(3):
        loop.run_step()
    return lengths


class TestForever:
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_it_sends_spans_until_a_signal_ends_it(
        self, start: Callable[..., subprocess.Popen[str]], receiver: Receiver, number: int
    ) -> None:
        demo = start("demo", "--forever", environment={**receiver.grpc_environment, "OTEL_NPU_STEPS_PER_SECOND": "all"})
        assert line_of(demo).startswith("Tracing a simulated NPU until Ctrl-C. Spans go to http://127.0.0.1:")
        receiver.wait_for(10, "worker_step")
        demo.send_signal(number)
        output, _ = demo.communicate(timeout=20)
        found = re.fullmatch(r"Ended after (\d+) steps\.\n", output)
        assert demo.returncode == 0
        assert found is not None, output
        assert len(receiver.named("worker_step")) == int(found[1])

    def test_it_takes_no_number_of_steps(self) -> None:
        done = otel_npu_command("demo", "--forever", "--steps", "5")
        assert done.returncode == 2
        assert "not together with --forever" in done.stderr


class TestRelay:
    def test_it_serves_a_program_of_its_session_and_ends_on_sigterm(
        self, start: Callable[..., subprocess.Popen[str]], receiver: Receiver, tmp_path: Path
    ) -> None:
        session = {"OTEL_NPU_SESSION": "shared"}
        relay = start("relay", environment={**receiver.http_environment, **session})
        assert line_of(relay).startswith("relay of session 'shared', process ")
        folder = Path(os.environ["XDG_RUNTIME_DIR"], f"otel-npu-{os.getuid()}")
        wait_until((folder / "shared.sock").exists)
        source = """
            import otel_npu

            for _ in range(3):
                with otel_npu.step("decode"), otel_npu.stage("forward"):
                    pass
        """
        environment = {
            **os.environ,
            **session,
            "OTEL_NPU_ENABLED": "1",
            "OTEL_NPU_DEVICE": "cpu",
            "OTEL_NPU_STEPS_PER_SECOND": "all",
            "OTEL_SERVICE_NAME": "a-client",
            # Were the program to start a relay of its own, its spans would go nowhere.
            "OTEL_TRACES_EXPORTER": "none",
        }
        subprocess.run(program(tmp_path, source), env=environment, check=True, timeout=60)
        spans = receiver.wait_for(3, "worker_step")
        assert {span.resource["service.name"] for span in spans} == {"a-client"}
        assert relay.poll() is None  # although its only client has gone
        relay.send_signal(signal.SIGTERM)
        assert relay.wait(20) == 0
        assert not (folder / "shared.sock").exists()

    def test_a_second_relay_does_not_take_the_session_from_the_first(
        self, start: Callable[..., subprocess.Popen[str]]
    ) -> None:
        session = {"OTEL_NPU_SESSION": "shared", "OTEL_TRACES_EXPORTER": "none"}
        first = start("relay", environment=session)
        path = Path(os.environ["XDG_RUNTIME_DIR"], f"otel-npu-{os.getuid()}", "shared.sock")
        wait_until(path.exists)
        second = otel_npu_command("relay", environment=session)
        assert second.returncode == 1
        assert "already" in second.stderr
        assert first.poll() is None
        assert path.exists()

    def test_without_a_session_it_says_what_is_missing(self) -> None:
        done = otel_npu_command("relay")
        assert done.returncode == 2
        assert done.stderr.startswith("OTEL_NPU_SESSION is not set")


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_version_is_printed() -> None:
    assert otel_npu_command("--version").stdout == f"otel-npu {otel_npu.__version__}\n"


def test_help_names_the_commands_and_loads_neither_the_sdk_nor_the_demo(
    run_program: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    done = run_program("""
        import sys

        sys.argv = ["otel-npu", "--help"]
        from otel_npu.cli import main

        try:
            main()
        except SystemExit as end:
            assert end.code == 0
        assert not {"opentelemetry.sdk", "otel_npu.cli.demo.command", "torch"} & set(sys.modules)
    """)
    assert "demo" in done.stdout
    assert "relay" in done.stdout


class TestDestination:
    @pytest.mark.parametrize(
        ("environment", "given", "text"),
        [
            ({}, False, "http://localhost:4317 (grpc)"),
            ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a:1"}, True, "http://a:1 (grpc)"),
            (
                {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a:1", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://b:2/x"},
                True,
                "http://b:2/x (grpc)",
            ),
            (
                {"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"},
                True,
                "http://localhost:4318 (http/protobuf)",
            ),
            ({"OTEL_EXPORTER_OTLP_ENDPOINT": "localhost:4317"}, True, "localhost:4317 (grpc)"),
            ({"OTEL_EXPORTER_OTLP_ENDPOINT": "https://me:pw@a/?key=pw"}, True, "https://a/ (grpc)"),
            ({"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://a:1"}, False, "OTEL_TRACES_"),
            ({"OTEL_TRACES_EXPORTER": "console"}, True, "the exporters of OTEL_TRACES_EXPORTER=console"),
        ],
    )
    def test_it_follows_the_standard_variables(self, environment: dict[str, str], given: bool, text: str) -> None:
        destination = Destination.from_environment(environment)
        assert destination.given is given
        assert text in str(destination)

    @pytest.mark.parametrize(
        ("environment", "name"),
        [
            ({}, "otel-npu-demo"),
            ({"OTEL_SERVICE_NAME": "mine"}, "mine"),
            ({"OTEL_RESOURCE_ATTRIBUTES": "a=b,service.name=theirs"}, "theirs"),
            ({"OTEL_RESOURCE_ATTRIBUTES": "service.name=theirs", "OTEL_SERVICE_NAME": "mine"}, "mine"),
        ],
    )
    def test_a_service_that_has_a_name_keeps_it(
        self, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], name: str
    ) -> None:
        monkeypatch.delenv("OTEL_SERVICE_NAME", raising=False)
        for variable, value in environment.items():
            monkeypatch.setenv(variable, value)
        assert name_service() == name


class TestBar:
    GLYPHS = ("█", "▌", "▐")

    @pytest.mark.parametrize(
        ("start", "length", "bar"),
        [
            (0, 1, "████"),
            (0.25, 0.5, " ██ "),
            (0.125, 0.5, "▐█▌ "),
            (0, 0.001, "▌   "),
            (1, 0, "   ▐"),
            (0.99, 0.5, "   ▐"),
        ],
    )
    def test_it_lies_where_its_time_lies_to_half_a_cell(self, start: float, length: float, bar: str) -> None:
        assert _bar(start, length, 4, self.GLYPHS) == bar
