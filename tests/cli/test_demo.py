"""`otel-npu demo`, as a person sees it and as a receiver gets it."""

from __future__ import annotations

import math
import os
import re
import signal
import socket
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from otel_npu.cli.demo import command
from otel_npu.cli.demo.destination import Destination, name_service
from otel_npu.cli.demo.picture import _bar
from otel_npu.cli.demo.receiver import Span as ReceivedSpan
from otel_npu.cli.demo.traces import Traces, slowest
from otel_npu.cli.demo.workload import Arrivals, requests
from tests.helpers.command_line import COMMAND, line_of, otel_npu_command

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.helpers.receiver import Receiver, Span

REQUESTS = 8
ROWS, COLUMNS = 24, 80


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the demo prints where no endpoint is set."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    done = subprocess.run(
        [COMMAND, "demo", "--requests", str(REQUESTS)],
        env={**environment, "XDG_RUNTIME_DIR": str(tmp_path_factory.mktemp("run")), "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return done.stdout


def span(name: str, span_id: bytes, parent_id: bytes, milliseconds: int, *, number: int = 0) -> ReceivedSpan:
    told: dict[str, Any] = {"npu.step.number": number, "npu.request.steps": 3, "npu.request.device_time": 0.7}
    return ReceivedSpan(name, b"t", span_id, parent_id, 0, milliseconds * 1_000_000, told)


class TestPicture:
    def test_a_request_is_drawn_with_its_phases_and_the_step_that_made_it_slow(self, shown: str) -> None:
        rows = re.findall(r"^ +([a-z_]+)(?:, \d+)? +[█▌▐▄▖▗]+ +[\d.]+$", shown, re.MULTILINE)
        wanted = ["llm_request", "queue", "prefill", "decode", "decode_step", "forward", "all_reduce"]
        assert [row for row in rows if row in wanted and row != "other_steps"] == wanted

    def test_it_says_what_was_slow_and_by_whose_clock(self, shown: str) -> None:
        found = re.search(
            r"Request cmpl-\w+ took (\d+) ms\. .* one decode step took (\d+) ms \((\d+) is usual\), "
            r"(\d+) of them all_reduce on the NPU",
            shown,
        )
        assert found is not None
        request_ms, step_ms, usual_ms, all_reduce_ms = map(int, found.groups())
        assert request_ms > step_ms > all_reduce_ms > 280
        assert usual_ms < 40

    def test_it_says_why_the_slow_step_was_kept(self, shown: str) -> None:
        because = r"number \d+ because it was slow, the others by rate"
        assert re.search(rf"\d+ steps \(({because}|by rate, the slow one, \d+, too)\)", shown)

    def test_a_step_that_is_long_because_the_host_was_late_is_not_taken_for_the_slow_one(self) -> None:
        late = [("decode_step", 350), ("forward", 340), ("mlp", 5)]
        stalled = [("decode_step", 320), ("forward", 310), ("all_reduce", 301)]
        spans = [span("llm_request", b"r", b"", 1000), span("decode", b"d", b"r", 900)]
        for number, chain in enumerate((late, stalled)):
            around = b"d"
            for depth, (name, milliseconds) in enumerate(chain):
                own = bytes((number, depth))
                spans.append(span(name, own, around, milliseconds, number=number))
                around = own
        slow = slowest(Traces(spans))
        assert slow is not None
        assert [stage.name for stage in slow.stages] == ["forward", "all_reduce"]

    def test_it_says_what_to_search_for(self, shown: str) -> None:
        assert "service otel-npu-demo, operation decode_step, Min Duration 100ms" in shown
        assert "tag npu.request.finish_reason=abort" in shown

    def test_it_fits_on_a_screen(self, shown: str) -> None:
        as_called = re.sub(r"\S*/otel-npu demo", "otel-npu demo", shown)
        lines = [math.ceil(max(1, len(line)) / COLUMNS) for line in as_called.splitlines()]
        assert sum(lines) <= ROWS

    def test_no_line_of_the_picture_is_wider_than_the_terminal(self, shown: str) -> None:
        assert max(map(len, shown.partition("\n\n")[0].splitlines())) <= COLUMNS

    def test_without_an_endpoint_it_says_how_to_get_one(self, shown: str) -> None:
        assert re.search(rf"All [\d,]+ spans of {REQUESTS} requests and \d+ steps .* came here over OTLP", shown)
        assert "docker run --rm -p 16686:16686 -p 4317:4317 jaegertracing/jaeger:2.20.0" in shown
        # By the name or the path by which it can be called here.
        assert re.search(r"OTEL_EXPORTER_OTLP_ENDPOINT=http://localhost:4317 \S*otel-npu demo", shown)

    def test_without_a_terminal_there_are_no_control_characters(self, shown: str) -> None:
        assert all(character.isprintable() or character == "\n" for character in shown)

    def test_a_stream_without_block_characters_gets_plain_ones(self) -> None:
        done = otel_npu_command("demo", "--requests", "3", environment={"PYTHONIOENCODING": "ascii"})
        assert done.returncode == 0, done.stderr
        assert done.stdout.isascii()
        assert "=====" in done.stdout

    def test_where_there_is_no_room_for_bars_the_numbers_stay(self) -> None:
        done = otel_npu_command("demo", "--requests", "3", environment={"COLUMNS": "34"})
        assert done.returncode == 0, done.stderr
        assert re.search(r"^        forward +\d+\.\d\d$", done.stdout, re.MULTILINE)

    @pytest.mark.parametrize(
        ("start", "length", "bar"),
        [
            (0, 1, "████"),
            (0.25, 0.5, " ██ "),
            (0.125, 0.5, "▐█▌ "),
            (0, 0.001, "▌   "),
            (1, 0, "   ▐"),
            (0.99, 0.5, "   ▐"),
            (-0.1, 0.35, "█   "),
        ],
    )
    def test_a_bar_lies_where_its_time_lies_to_half_a_cell(self, start: float, length: float, bar: str) -> None:
        assert _bar(start, length, 4, ("█", "▌", "▐")) == bar


@pytest.mark.slow
class TestSpans:
    @pytest.mark.parametrize("protocol", ["grpc", "http"])
    def test_every_request_goes_to_the_endpoint_whole_as_a_servers_would(
        self, receiver: Receiver, protocol: str
    ) -> None:
        environment = receiver.grpc_environment if protocol == "grpc" else receiver.http_environment
        done = otel_npu_command("demo", "--requests", str(REQUESTS), environment=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        by_parent: dict[str, list[Span]] = {}
        for span in receiver.spans:
            by_parent.setdefault(span.parent_span_id, []).append(span)
        found = receiver.named("llm_request")
        assert len(found) == REQUESTS
        ends = []
        for request in found:
            phases = {span.name: span for span in by_parent[request.span_id]}
            assert set(phases) == {"queue", "prefill", "decode"}
            assert {span.trace_id for span in phases.values()} == {request.trace_id}
            assert phases["queue"].attributes["gen_ai.response.id"] == request.attributes["gen_ai.response.id"]
            ends.append(phases["decode"].attributes["npu.request.finish_reason"])
        assert sorted(ends) == ["abort", *["length"] * (REQUESTS - 1)]
        assert max(span.end_ns - span.start_ns for span in receiver.named("decode_step")) > 280e6
        assert {span.attributes["npu.timing"] for span in receiver.named("forward")} == {"device"}
        assert receiver.named("engine_step")
        assert {span.resource["service.name"] for span in receiver.spans} == {"otel-npu-demo"}
        assert f"went to {environment['OTEL_EXPORTER_OTLP_ENDPOINT']}" in done.stdout
        assert {point.attributes["npu.stage.name"] for point in receiver.points("npu.stage.duration")} >= {"forward"}

    def test_a_long_prompt_comes_in_steps(self, receiver: Receiver) -> None:
        otel_npu_command("demo", "--requests", str(REQUESTS), environment=receiver.http_environment)
        assert len(receiver.named("prefill_step")) > 1


@pytest.mark.slow
class TestFailure:
    def test_an_endpoint_that_does_not_answer_is_an_error_that_names_it(self) -> None:
        with socket.socket() as taken:  # bound, not listening: nobody else gets the port
            taken.bind(("127.0.0.1", 0))
            endpoint = f"http://user:secret@127.0.0.1:{taken.getsockname()[1]}"
            done = otel_npu_command(
                "demo",
                "--requests",
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
        assert done.stderr == ""

    def test_an_endpoint_that_refuses_is_an_error_too(self, receiver: Receiver) -> None:
        receiver.refuse = True
        done = otel_npu_command("demo", "--requests", "3", environment=receiver.http_environment)
        assert done.returncode == 1
        assert "The spans could not be sent to" in done.stdout
        assert "403" in done.stdout

    def test_an_exporter_that_is_not_installed_is_an_error_that_says_what_is(self) -> None:
        done = otel_npu_command("demo", "--requests", "3", environment={"OTEL_TRACES_EXPORTER": "nonesuch"})
        assert done.returncode == 1
        assert "OTEL_TRACES_EXPORTER='nonesuch': takes " in done.stdout

    @pytest.mark.parametrize("count", ["2", "0", "-5", "10001", "many"])
    def test_a_bad_number_of_requests_is_an_error_that_names_the_option(self, count: str) -> None:
        done = otel_npu_command("demo", "--requests", count)
        assert done.returncode == 2
        assert "Invalid value for '--requests'" in done.stderr

    def test_where_the_sdk_is_disabled_nothing_is_traced(self, receiver: Receiver) -> None:
        done = otel_npu_command(
            "demo", "--requests", "3", environment={**receiver.http_environment, "OTEL_SDK_DISABLED": "true"}
        )
        assert done.returncode == 1
        assert "OTEL_SDK_DISABLED=true" in done.stdout
        assert receiver.exports == 0

    def test_nothing_is_left_behind_when_it_fails(self) -> None:
        otel_npu_command("demo", "--requests", "3", environment={"OTEL_TRACES_EXPORTER": "nonesuch"})
        assert not list(Path(os.environ["XDG_RUNTIME_DIR"]).rglob("*.sock"))


class _Relay:
    """A relay that is slow to start, or ends, or complains."""

    def __init__(self, *, ended: bool = False, words: str = "") -> None:
        self.ended = ended
        self._words = words

    def last_words(self) -> str:
        return self._words


class TestPatience:
    @pytest.fixture
    def flushes(self, monkeypatch: pytest.MonkeyPatch) -> list[float]:
        """The answers to flushes are no until the clock shows 40 s; each look takes 3 s of it."""
        clock = [0.0]

        def flush(timeout_seconds: float) -> bool:
            clock[0] += timeout_seconds
            return clock[0] > 40

        monkeypatch.setattr("otel_npu.flush", flush)
        return clock

    def arrived(self, relay: Any, clock: list[float]) -> bool:
        return command._arrived(relay, now=lambda: clock[0])

    def test_a_relay_that_is_slow_to_start_is_waited_for(self, flushes: list[float]) -> None:
        assert self.arrived(_Relay(), flushes)

    @pytest.mark.parametrize("relay", [_Relay(ended=True), _Relay(words="no exporter")])
    def test_one_that_has_ended_or_says_what_is_wrong_is_not(self, flushes: list[float], relay: _Relay) -> None:
        assert not self.arrived(relay, flushes)
        assert flushes[0] < 10

    def test_it_does_not_wait_for_ever(self, flushes: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(command, "_PATIENCE_SECONDS", 20.0)
        assert not self.arrived(_Relay(), flushes)


class TestWorkload:
    def test_the_same_seed_gives_the_same_requests(self) -> None:
        def asked(seed: int) -> list[tuple[int, int, int]]:
            return [(made.after_steps, made.prompt_tokens, made.output_tokens) for made in requests(seed, 5)]

        assert asked(7) == asked(7) != asked(8)

    @pytest.mark.parametrize("count", [3, 8, 30, 50])
    def test_one_is_stalled_and_of_another_the_client_goes_away(self, count: int) -> None:
        made = list(requests(1, count))
        assert len(made) == count
        assert [request.is_stalled for request in made].count(True) == 1
        assert [request.hangs_up for request in made].count(True) == 1
        assert not any(request.is_stalled and request.hangs_up for request in made)

    def test_all_of_them_arrive_one_by_one_or_when_there_is_nothing_else_to_do(self) -> None:
        arrivals = Arrivals(requests(1, 5))
        assert len(arrivals.after_step(idle=True)) == 1
        assert len(arrivals.after_step(idle=False)) == 0
        for _ in range(4):
            assert len(arrivals.after_step(idle=True)) == 1
        assert arrivals.over
        assert not arrivals.after_step(idle=True)


@pytest.mark.slow
class TestForever:
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_it_serves_until_a_signal_ends_it(
        self, start: Callable[..., subprocess.Popen[str]], receiver: Receiver, number: int
    ) -> None:
        demo = start("demo", "--forever", environment=receiver.grpc_environment)
        assert line_of(demo).startswith(
            "Serving requests on a simulated NPU until Ctrl-C. Spans go to http://127.0.0.1:"
        )
        receiver.wait_for(3, "llm_request")
        demo.send_signal(number)
        output, _ = demo.communicate(timeout=200)
        found = re.fullmatch(r"Ended after (\d+) requests\.\n", output)
        assert demo.returncode == 0
        assert found is not None, output
        assert len(receiver.named("llm_request")) == len(receiver.named("queue")) == int(found[1])

    def test_it_takes_no_number_of_requests(self) -> None:
        done = otel_npu_command("demo", "--forever", "--requests", "5")
        assert done.returncode == 2
        assert "not together with --forever" in done.stderr


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
