"""Which steps of a program without an engine become traces, and that what lies inside them does so too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from otel_npu.drops import Drops
from otel_npu.relay.assembler import Assembler
from otel_npu.relay.spans import span_limits
from otel_npu.relay.wall import WallClock
from otel_npu.slow import SlowSteps
from tests.helpers.built import hello, step, unfinished
from tests.helpers.joined import MS, attributes, host_stage, id_of, parent_id, span_id

if TYPE_CHECKING:
    from collections.abc import Sequence

    from opentelemetry.sdk.trace import ReadableSpan

USUAL_NS = 10 * MS


class Program:
    """Runs one step after the other, none of them chosen to be a trace."""

    def __init__(self, factor: float = 3) -> None:
        self.drops = Drops()
        wall = WallClock(monotonic=lambda: 0, unix=lambda: 0)
        self.assembler = Assembler(hello(device_kind="cpu"), wall, span_limits, SlowSteps(factor, self.drops))
        self.at_ns = 0
        self.number = 0

    def step(self, duration_ns: int = USUAL_NS, **changes: Any) -> Sequence[ReadableSpan]:
        """A step as long as this, right after the one before it."""
        self.number += 1
        self.at_ns += duration_ns
        return self.told(self.at_ns - duration_ns, duration_ns, span_id=id_of(self.number), **changes)

    def told(self, start_ns: int, duration_ns: int, **changes: Any) -> Sequence[ReadableSpan]:
        stages = [host_stage("forward", start_ns, duration_ns)]
        return self.assembler.step(step(self.number, **{"kept": False, "stages": stages, **changes}))

    def usual(self, steps: int = 20) -> None:
        for _ in range(steps):
            assert self.step() == []


def reasons(spans: Sequence[ReadableSpan]) -> list[str]:
    return [attributes(span)["npu.sampled.reason"] for span in spans if span.name == "worker_step"]


def test_a_slow_step_is_kept_and_says_why() -> None:
    program = Program()
    program.usual()
    forward, worker = program.step(4 * USUAL_NS)
    assert (forward.name, worker.name) == ("forward", "worker_step")
    assert attributes(worker)["npu.sampled.reason"] == "slow"
    assert parent_id(forward) == span_id(worker)
    assert program.step() == []


def test_a_step_that_was_chosen_says_so() -> None:
    assert reasons(Program().step(kept=True)) == ["rate"]


def test_a_step_with_an_error_is_kept() -> None:
    assert reasons(Program().step(error="ValueError")) == ["error"]


def test_nobody_is_kept_for_waiting_behind_a_slow_step() -> None:
    program = Program()
    program.usual()
    assert program.step(10 * USUAL_NS)
    # It was enqueued with the slow one, and its first stage began to wait then.
    behind = program.told(program.at_ns - 10 * USUAL_NS, 11 * USUAL_NS, span_id=id_of(99))
    assert behind == []


def test_a_step_without_a_trace_id_is_never_kept() -> None:
    program = Program()
    program.usual()
    assert program.step(10 * USUAL_NS, trace_id=b"") == []
    assert program.step(error="ValueError", trace_id=b"") == []


def test_a_bare_stage_is_compared_with_those_of_its_name() -> None:
    program = Program()
    for at_ns in range(0, 200_000, 10_000):
        program.step(bare=True, stages=[host_stage("load", at_ns, 1000)])
        program.step(bare=True, stages=[host_stage("save", at_ns + 5000, 10)])
    assert program.step(bare=True, stages=[host_stage("load", 200_000, 1000)]) == []
    [span] = program.step(bare=True, stages=[host_stage("save", 210_000, 1000)])
    assert (span.name, attributes(span)["npu.sampled.reason"]) == ("save", "slow")


def test_what_lies_inside_a_slow_step_is_kept_with_it() -> None:
    program = Program()
    program.usual()
    ns = 4 * USUAL_NS
    start_ns = program.at_ns
    inside = {"parent_span_id": id_of(900), "kind": "inner"}
    assert program.told(start_ns, 1, span_id=id_of(901), parent_span_id=id_of(902), kind="innermost") == []
    assert program.told(start_ns, ns // 2, span_id=id_of(902), **inside) == []
    assert program.told(start_ns + ns // 2, ns // 2, span_id=id_of(903), **inside) == []
    assert program.told(start_ns, 1, span_id=id_of(904), parent_span_id=id_of(777), kind="another's") == []
    spans = [span for span in program.told(start_ns, ns, span_id=id_of(900)) if span.name == "worker_step"]
    assert [span_id(span) for span in spans] == [901, 902, 903, 900]
    assert reasons(spans) == ["slow"] * 4


def test_what_is_kept_inside_keeps_what_is_around_it() -> None:
    program = Program()
    program.usual()
    inner = program.told(0, 10, span_id=id_of(901), parent_span_id=id_of(900), error="ValueError")
    assert reasons(inner) == ["error"]
    assert reasons(program.told(0, 20, span_id=id_of(900))) == ["error"]


def test_what_is_inside_is_held_in_bounded_memory() -> None:
    program = Program()
    stages = [host_stage("forward", 0, 10) for _ in range(100)]
    for number in range(1000):
        program.told(0, 10, span_id=id_of(number + 1), parent_span_id=id_of(9000), stages=stages)
    keeping = program.assembler._keeping
    assert len(keeping._held) == 40
    program.told(0, 10, span_id=id_of(9), parent_span_id=id_of(9001), seen_ns=3_000_000_000, kind="later")
    assert len(keeping._held) == 1  # the others are older than two seconds


def test_a_step_that_hung_is_kept_if_it_ends_after_all() -> None:
    program = Program()
    program.assembler.unfinished(unfinished(span_id=id_of(1)))
    assert reasons(program.step()) == ["hang"]


def test_the_usual_of_a_process_is_followed_with_slow_steps_off() -> None:
    program = Program(factor=float("inf"))
    program.usual()
    assert program.step(1000 * USUAL_NS) == []
