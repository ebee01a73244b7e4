"""What strikes in the midst of our lines: handlers of signals that raise, forks, threads that end, tasks in turns."""

from __future__ import annotations

import asyncio
import signal
import threading
from typing import TYPE_CHECKING, Any

import pytest

import otel_npu
from otel_npu.capture import records, resolver, switch
from otel_npu.capture.stages import Stage
from otel_npu.interrupts import from_outside
from otel_npu.native import native
from tests.faults.effort import times
from tests.helpers.capturing import MILLISECOND, Captured, Clock, capturing, simulated, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

WAYS = [
    pytest.param("", id="extension", marks=pytest.mark.skipif(native is None, reason="not built")),
    pytest.param("1", id="python"),
]

RAISING = """
import random, signal, sys, time
import otel_npu
from otel_npu.capture import records, resolver, switch

class SoftTimeLimit(Exception): pass
kind = {{"exception": SoftTimeLimit, "interrupt": KeyboardInterrupt, "exit": SystemExit}}["{kind}"]
fired = 0
def handler(*_):
    global fired
    fired += 1
    raise kind("time is up")
signal.signal(signal.SIGALRM, handler)

otel_npu.enable(otel_npu.Settings(device="{device}", steps_per_second=0, slow_step=float("inf")))
with otel_npu.stage("warm"): pass
assert otel_npu.flush(30)
caught = 0
for _ in range({times}):
    before = fired
    try:
        signal.setitimer(signal.ITIMER_REAL, random.uniform(2e-5, 2e-4))
        while fired == before:
            with otel_npu.step("decode"):
                with otel_npu.stage("forward"): pass
            with otel_npu.stage("alone"): pass
    except kind:
        caught += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
assert (fired, caught) == ({times}, {times}), (fired, caught)
recorder = switch.current_recorder()
assert recorder is not None, "tracing is off"
thread = recorder.local.thread
def open_now(): return [step for step in thread.open.values() if not step.closed_ns]
# The next step has no part of what was interrupted.
otel_npu.flush(30)
with otel_npu.step("after") as _:
    with otel_npu.stage("forward"): pass
    (step,) = open_now()
    assert step.outer is None and len(step.stages) == 1
assert otel_npu.flush(30)
pools = recorder.device.pools.values()
recorder.idle._watch()
assert all(pool.free for pool in pools if pool.pairs)
print("exits")
"""


@pytest.mark.parametrize("pure", WAYS)
@pytest.mark.parametrize("device", ["cpu", "simulated"])
@pytest.mark.parametrize("kind", ["exception", "interrupt", "exit"])
def test_what_a_signal_handler_raises_reaches_the_program_and_tracing_goes_on(
    run_program: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, kind: str, device: str, pure: str
) -> None:
    # Whoever traces each line for coverage is so slow that every signal would strike there.
    monkeypatch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)
    source = RAISING.format(kind=kind, device=device, times=times(1500, 6000 if kind == "exit" else 20_000))
    done = run_program(source, {"OTEL_NPU_PURE_PYTHON": pure, "OTEL_TRACES_EXPORTER": "none"}, timeout=times(180, 900))
    assert done.stdout == "exits\n"


def test_an_exception_is_the_programs_if_a_handler_raised_it() -> None:
    class RaisedError(Exception):
        pass

    def handler(number: int, frame: object) -> None:
        raise RaisedError

    def once(*_: object) -> None:
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)  # it is not the one installed any more when it is looked for
        raise RaisedError

    def fault() -> None:
        raise ValueError

    before = signal.getsignal(signal.SIGUSR1)
    try:
        for of_the_program in (handler, once):
            signal.signal(signal.SIGUSR1, of_the_program)
            with pytest.raises(RaisedError) as raised:
                signal.raise_signal(signal.SIGUSR1)
            assert from_outside(raised.value)
    finally:
        signal.signal(signal.SIGUSR1, before)
    with pytest.raises(ValueError) as ours:
        fault()
    assert not from_outside(ours.value)
    assert from_outside(KeyboardInterrupt())


def test_a_step_in_which_another_thread_begins_a_stage_meanwhile_is_not_done(
    captured: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    thread = captured.recorder.local.thread
    thread.busy = True  # nobody else resolves it
    captured.stage("forward")
    captured.clock.ns += 100 * MILLISECOND
    (step,) = thread.pending
    begun = records.new_stage(Stage, captured.recorder, "begun", {})
    begun.pair, begun.exited_ns = None, 0

    def abandoned(*_: object) -> bool:
        step.stages.append(begun)
        return True

    step.stages[0].exited_ns = 0
    monkeypatch.setattr(resolver, "abandoned", abandoned)
    assert not resolver._done(step, set(), captured.recorder.drops)
    step.stages.remove(begun)
    assert resolver._done(step, set(), captured.recorder.drops)
    thread.busy = False


def test_a_step_that_nobody_holds_any_more_is_closed(captured: Captured) -> None:
    step = otel_npu.step("forgotten").open()
    captured.stage("forward")
    del step
    captured.stage("later")
    forgotten, later = captured.steps()
    assert [(one.kind, one.bare) for one in (forgotten, later)] == [("forgotten", False), ("later", True)]
    assert captured.dropped() == {"interrupted": 1}


def test_drop_counts_outlast_an_interrupt_of_the_batch_that_they_are_to_go_with(
    captured: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were taken for its first packet when the second was interrupted: nothing has been sent yet."""
    packs: list[int] = []
    pack = records.pack

    def interrupted_once(steps: Any, *rest: Any) -> bytes:
        packs.append(len(steps))
        if len(packs) == 2:
            raise KeyboardInterrupt
        return pack(steps, *rest)

    monkeypatch.setattr(resolver, "pack", interrupted_once)
    captured.recorder.drops.add("too_many_links", 3)
    thread = captured.recorder.local.thread
    thread.busy = True  # nobody else resolves them
    for number in range(12):
        captured.stage(f"stage {number}")
    captured.clock.ns += 100 * MILLISECOND
    with pytest.raises(KeyboardInterrupt):
        captured.recorder._resolver.resolve(thread, 96)
    thread.busy = False
    assert [stage.name for step in captured.steps() for stage in step.stages] == [f"stage {i}" for i in range(12)]
    assert packs[:2] == [8, 4]
    assert captured.dropped() == {"too_many_links": 3}


@pytest.mark.parametrize("enabled", ["0", "1"])
def test_a_child_forked_while_a_thread_uses_the_first_stage_is_traced(
    run_program: Callable[..., Any], enabled: str
) -> None:
    done = run_program(
        """
        import os, signal, threading, time
        import otel_npu

        def first():
            with otel_npu.stage("first"): pass

        for _ in range(3):
            thread = threading.Thread(target=first)
            thread.start()
            pid = os.fork()
            if not pid:
                with otel_npu.stage("child"): pass
                os._exit(0)
            for _ in range(600):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended: break
                time.sleep(0.1)
            if not ended: os.kill(pid, signal.SIGKILL)  # it has the output that is waited for
            assert ended and not status, "the child hangs"
            thread.join()
        """,
        {"OTEL_NPU_ENABLED": enabled, "OTEL_NPU_DEVICE": "cpu", "OTEL_TRACES_EXPORTER": "none"},
        timeout=240,
    )
    assert done.returncode == 0


@pytest.mark.usefixtures("undecided")
def test_what_other_threads_capture_while_tracing_is_turned_on_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_NPU_ENABLED", "1")
    monkeypatch.setenv("OTEL_NPU_DEVICE", "cpu")
    monkeypatch.setenv("OTEL_NPU_EXPORT", "inprocess")
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")
    turning_on, others_wait = threading.Event(), threading.Event()
    begin = switch._begin

    def slowly(*given: Any) -> Any:
        turning_on.set()
        assert not others_wait.wait(0.2), "somebody has not waited"
        return begin(*given)

    monkeypatch.setattr(switch, "_begin", slowly)
    given: list[object] = []

    def capture() -> None:
        turning_on.wait(20)
        given.append(otel_npu.stage("forward"))
        others_wait.set()

    threads = [threading.Thread(target=capture) for _ in range(8)]
    for thread in threads:
        thread.start()
    given.append(otel_npu.stage("forward"))
    for thread in threads:
        thread.join()
    assert {type(stage).__name__ for stage in given} == {"Stage"}


def test_a_thread_that_ends_inside_a_stage_gives_its_events_back() -> None:
    device = simulated(Clock())
    device.pool_pairs = 2
    with capturing(device) as captured:

        def end_inside() -> None:
            otel_npu.step("decode").open().__class__  # noqa: B018
            stage = otel_npu.stage("forward")
            stage.__enter__()
            left.append(stage)  # somebody holds it for ever

        left: list[Any] = []
        for _ in range(4):
            thread = threading.Thread(target=end_inside)
            thread.start()
            thread.join()
            wait_until(lambda: not any(one.open for one in captured.recorder.threads))
            captured.clock.ns += 10 * MILLISECOND
            wait_until(lambda: not any(one.pending for one in captured.recorder.threads))
        captured.stage("after")
        captured.finish()
        assert captured.steps()[-1].stages[0].device_ns is not None


def test_steps_of_tasks_that_share_a_thread_are_the_tasks_own(captured: Captured) -> None:
    async def request(number: int) -> None:
        for _ in range(5):
            with otel_npu.step(f"task {number}"):
                await asyncio.sleep(0)
                captured.stage(f"stage of {number}")
                await asyncio.sleep(0)

    async def serve() -> None:
        await asyncio.gather(*map(request, range(100)))

    asyncio.run(serve())
    steps = captured.steps()
    assert len(steps) == 500
    assert {(step.kind, *[stage.name for stage in step.stages]) for step in steps} == {
        (f"task {number}", f"stage of {number}") for number in range(100)
    }
    assert captured.dropped() == {}
