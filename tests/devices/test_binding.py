"""What the real torch_npu binding does with events, as far as the design rests on it.

The wheel is unmodified; behind it runs the simulated runtime of `tests/helpers/ascend`. With `TASK_QUEUE_ENABLE=1`
(torch_npu's default) kernels and records go through the host's task queue, with 0 straight to the runtime.
"""

# torch can only be imported once the simulated runtime is loaded

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import textwrap
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.helpers import REPOSITORY
from tests.helpers.traced import eventually

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.helpers.ascend.simulator import Simulator

TASK_QUEUE = os.environ.get("TASK_QUEUE_ENABLE", "1") != "0"
needs_task_queue = pytest.mark.skipif(not TASK_QUEUE, reason="is about the task queue, which is off")

MILLISECOND = 1_000_000  # in ns
# How long the task queue is kept busy: far longer than the calls that must not wait for it.
BUSY = 200 * MILLISECOND
DEVICE_ERROR = 507015


def new_event() -> Any:
    import torch

    return torch.Event(device="npu", enable_timing=True)


def kernel(nanoseconds: int) -> None:
    """Through torch_npu's task queue, as any operator."""
    import torch

    torch.npu._sleep(nanoseconds)


def stream_pointer() -> int:
    """The current stream for ACL. Reading it drains the task queue: all before it has been dispatched."""
    import torch

    return int(torch.npu.current_stream().npu_stream)


def synchronize() -> None:
    import torch

    torch.npu.synchronize()


def finished_pair(ascend: Simulator, nanoseconds: int = MILLISECOND) -> tuple[Any, Any]:
    """Two finished events with a kernel between them and nothing else: all three wait behind a backlog."""
    start, end = new_event(), new_event()
    backlog = ascend.hold(stream_pointer())
    start.record()
    kernel(nanoseconds)
    end.record()
    stream_pointer()
    ascend.release(backlog)
    synchronize()
    return start, end


def acl() -> Any:
    """ACL as a tracer reaches it: the library that is in the process already, by its soname."""
    return ctypes.CDLL("libascendcl.so")


def raw(event: Any) -> ctypes.c_void_p:
    return ctypes.c_void_p(event.event_id)


def elapsed_us(start: Any, end: Any) -> float:
    """Microseconds between two finished events, from ACL itself."""
    milliseconds = ctypes.c_float()
    assert acl().aclrtEventElapsedTime(ctypes.byref(milliseconds), raw(start), raw(end)) == 0
    return milliseconds.value * 1000


def timestamp_us(event: Any) -> int:
    """Whole microseconds of the device's clock at which an event was reached, from ACL itself."""
    microseconds = ctypes.c_uint64()
    assert acl().aclrtEventGetTimestamp(raw(event), ctypes.byref(microseconds)) == 0
    return microseconds.value


def in_thread(call: Callable[[], object]) -> object:
    results: list[object] = []
    thread = threading.Thread(target=lambda: results.append(call()))
    thread.start()
    thread.join()
    return results[0]


def in_process(script: str) -> list[str]:
    """Run a script with the task queue on, in a process of its own: what it does to the queue is for good.

    Returns the lines that it prints.
    """
    preamble = """
        import time
        from tests.helpers.ascend.simulator import Simulator
        ascend = Simulator.load()
        import torch, torch_npu
        torch.npu.set_device(0)
        event = torch.Event(device="npu", enable_timing=True)
        event.record()
        torch.npu._sleep(1)
        torch.npu.synchronize()

        def raises(call):
            try:
                call()
            except RuntimeError:
                return True
            return False

        def until(condition):
            give_up = time.monotonic() + 30
            while not condition():
                assert time.monotonic() < give_up
                time.sleep(0.05)  # a task enqueued just as the queue fails is stuck in it
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(preamble) + textwrap.dedent(script)],
        env={**os.environ, "TASK_QUEUE_ENABLE": "1"},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


class TestReading:
    def test_the_raw_handles_give_the_exact_length_of_a_kernel(self, ascend: Simulator) -> None:
        start, end = finished_pair(ascend, 3 * MILLISECOND)
        assert elapsed_us(start, end) == pytest.approx(3000, abs=1)
        assert timestamp_us(end) - timestamp_us(start) == pytest.approx(3000, abs=1)

    def test_torch_agrees_with_the_raw_handles(self, ascend: Simulator) -> None:
        start, end = finished_pair(ascend)
        assert start.elapsed_time(end) * 1000 == pytest.approx(elapsed_us(start, end))

    def test_elapsed_time_synchronizes_even_finished_events(self, ascend: Simulator) -> None:
        start, end = finished_pair(ascend)
        before = ascend.count("synchronize_event")
        start.elapsed_time(end)
        assert ascend.count("synchronize_event") == before + 2

    def test_a_raw_read_synchronizes_nothing(self, ascend: Simulator) -> None:
        start, end = finished_pair(ascend)
        before = ascend.count("synchronize")
        elapsed_us(start, end)
        timestamp_us(start)
        assert ascend.count("synchronize") == before

    @needs_task_queue
    def test_elapsed_time_of_finished_events_stalls_while_the_task_queue_is_busy(self, ascend: Simulator) -> None:
        start, end = finished_pair(ascend)
        ascend.configure(dispatch_delay_ns=BUSY)
        before = ascend.count("record")
        new_event().record()
        start.elapsed_time(end)
        assert ascend.count("record") == before + 1, "it has waited until the record was dispatched"

    @needs_task_queue
    def test_a_raw_read_does_not_stall_while_the_task_queue_is_busy(self, ascend: Simulator) -> None:
        start, end = finished_pair(ascend)
        ascend.configure(dispatch_delay_ns=BUSY)
        before = ascend.count("record")
        new_event().record()
        assert elapsed_us(start, end) == pytest.approx(1000, abs=1)
        assert ascend.count("record") == before, "the record is still waiting for its dispatch"

    def test_an_unfinished_event_has_no_timestamp(self, ascend: Simulator) -> None:
        event = new_event()
        ascend.hold(stream_pointer())
        event.record()
        stream_pointer()
        assert acl().aclrtEventGetTimestamp(raw(event), ctypes.byref(ctypes.c_uint64())) != 0


class TestQuery:
    def test_an_event_that_was_never_recorded_is_ready(self, ascend: Simulator) -> None:
        assert new_event().query()

    def test_an_event_is_ready_from_the_end_of_what_is_before_it(self, ascend: Simulator) -> None:
        event = new_event()
        ascend.manual_clock(True)
        kernel(MILLISECOND)
        event.record()
        stream_pointer()
        assert not event.query()
        ascend.advance(999)
        assert not event.query()
        ascend.advance(1)
        assert event.query()

    @needs_task_queue
    def test_an_event_is_not_ready_before_its_record_is_dispatched(self, ascend: Simulator) -> None:
        event = new_event()
        ascend.configure(dispatch_delay_ns=BUSY)
        before = ascend.count("record")
        event.record()
        assert not event.query()
        assert ascend.count("record") == before
        stream_pointer()
        assert event.query()

    @needs_task_queue
    def test_a_finished_event_is_not_ready_again_before_its_new_record_is_dispatched(self, ascend: Simulator) -> None:
        event, _ = finished_pair(ascend)
        assert event.query()
        ascend.configure(dispatch_delay_ns=BUSY)
        before = ascend.count("record")
        event.record()
        assert not event.query()
        assert ascend.count("record") == before
        stream_pointer()
        assert event.query()

    def test_a_thread_that_never_set_a_device_can_query(self, ascend: Simulator) -> None:
        event, _ = finished_pair(ascend)
        before = ascend.count("set_device")
        assert in_thread(event.query) is True
        assert ascend.count("set_device") == before

    def test_an_event_behind_a_hung_kernel_is_ready_only_after_it(self, ascend: Simulator) -> None:
        event = new_event()
        hung = ascend.hold(stream_pointer())
        event.record()
        stream_pointer()
        assert not event.query()
        ascend.manual_clock(True)
        ascend.advance(3600e6)
        assert not event.query()
        ascend.release(hung)
        assert event.query()

    def test_the_host_can_see_an_event_later_than_the_device_has_reached_it(self, ascend: Simulator) -> None:
        event = new_event()
        ascend.manual_clock(True)
        ascend.configure(visible_latency_ns=5000)
        event.record()
        stream_pointer()
        ascend.advance(4)
        assert not event.query()
        ascend.advance(1)
        assert event.query()


class TestRecording:
    def test_a_second_record_makes_no_new_acl_event(self, ascend: Simulator) -> None:
        event, _ = finished_pair(ascend)
        handle, before = event.event_id, ascend.count("create")
        event.record()
        synchronize()
        assert event.event_id == handle
        assert ascend.count("create") == before

    def test_an_acl_event_is_made_by_the_first_record_and_not_before(self, ascend: Simulator) -> None:
        before = ascend.count("create")
        event = new_event()
        assert ascend.count("create") == before
        event.record()
        stream_pointer()
        assert ascend.count("create") == before + 1

    def test_a_second_record_of_a_pending_event_loses_the_first(self, ascend: Simulator) -> None:
        start, end = new_event(), new_event()
        ascend.manual_clock(True)
        start.record()
        kernel(MILLISECOND)
        end.record()
        kernel(MILLISECOND)
        end.record()
        synchronize()
        assert elapsed_us(start, end) == pytest.approx(2000, abs=1)

    def test_a_stream_that_waits_for_an_event_goes_on_after_it(self, ascend: Simulator) -> None:
        import torch

        before, kernel_end, after = new_event(), new_event(), new_event()
        side = torch.npu.Stream()
        ascend.manual_clock(True)
        before.record(side)
        ascend.launch(stream_pointer(), microseconds=1500)
        kernel_end.record()
        kernel_end.wait(side)
        after.record(side)
        synchronize()
        assert elapsed_us(before, after) == pytest.approx(1500, abs=1)

    def test_100_000_records_need_no_more_acl_events(self, ascend: Simulator) -> None:
        start, end = finished_pair(ascend)
        live, before = ascend.count("live_events"), ascend.count("record")
        for _ in range(50_000):
            start.record()
            end.record()
        synchronize()
        assert ascend.count("record") == before + 100_000
        assert ascend.count("live_events") == live

    def test_an_event_of_one_device_cannot_be_recorded_on_another(self, ascend: Simulator) -> None:
        import torch

        event, _ = finished_pair(ascend)
        with torch.npu.device(1), pytest.raises(RuntimeError, match="device"):
            event.record()

    def test_a_record_during_graph_capture_leaves_the_old_timing(self, ascend: Simulator) -> None:
        import torch

        start, end = finished_pair(ascend)
        fresh = new_event()
        graph = torch.npu.NPUGraph()
        with torch.npu.graph(graph):
            assert torch.npu.is_current_stream_capturing()
            start.record()
            kernel(5 * MILLISECOND)
            end.record()
            fresh.record()
            with pytest.raises(RuntimeError, match="107028"):
                eventually(end.query, "the record has left the task queue; until then it says no")
        graph.replay()
        synchronize()
        assert end.query()
        assert elapsed_us(start, end) == pytest.approx(1000, abs=1)
        assert fresh.query(), "as if it had never been recorded"

    def test_a_replayed_graph_takes_its_time_between_two_events(self, ascend: Simulator) -> None:
        import torch

        graph = torch.npu.NPUGraph()
        with torch.npu.graph(graph):
            kernel(5 * MILLISECOND)
        start, end = new_event(), new_event()
        ascend.manual_clock(True)
        start.record()
        graph.replay()
        end.record()
        synchronize()
        assert elapsed_us(start, end) == pytest.approx(5000, abs=1)


class TestBypassingTheTaskQueue:
    @needs_task_queue
    def test_a_plain_side_stream_waits_in_the_queue_too(self, ascend: Simulator) -> None:
        import torch

        event, side = new_event(), torch.npu.Stream()
        ascend.configure(launch_dispatch_delay_ns=BUSY)
        before = ascend.count("launch")
        kernel(MILLISECOND)
        event.record(side)
        assert not event.query()
        assert ascend.count("launch") == before

    @needs_task_queue
    def test_a_sync_launch_stream_does_not(self, ascend: Simulator) -> None:
        import torch

        event, side = new_event(), torch.npu.SyncLaunchStream()
        ascend.configure(launch_dispatch_delay_ns=BUSY)
        before = ascend.count("launch")
        kernel(MILLISECOND)
        event.record(side)
        assert event.query()
        assert ascend.count("launch") == before, "the kernel is still waiting for its dispatch"

    @needs_task_queue
    def test_a_raw_record_on_a_raw_stream_does_not(self, ascend: Simulator) -> None:
        event, _ = finished_pair(ascend)
        stream = ctypes.c_void_p()
        assert acl().aclrtCreateStream(ctypes.byref(stream)) == 0
        old = timestamp_us(event)
        ascend.configure(launch_dispatch_delay_ns=BUSY)
        before = ascend.count("launch")
        kernel(MILLISECOND)
        assert acl().aclrtRecordEvent(raw(event), stream) == 0
        assert event.query()
        assert timestamp_us(event) > old
        assert ascend.count("launch") == before, "the kernel is still waiting for its dispatch"
        assert acl().aclrtDestroyStream(stream) == 0


class TestFailures:
    @pytest.mark.slow
    def test_a_failed_launch_is_raised_once_by_the_next_record_and_then_nothing_runs(self, ascend: Simulator) -> None:
        printed = in_process(f"""
            ascend.fail("launch", {DEVICE_ERROR})
            print("launch raises:", raises(lambda: torch.npu._sleep(1000)))
            until(lambda: ascend.count("launch") == 2)
            time.sleep(0.05)
            until(lambda: raises(event.record))
            records = ascend.count("record")
            print("a later record raises:", any([raises(event.record) for _ in range(100)]))
            print("a later launch raises:", raises(lambda: torch.npu._sleep(1000)))
            print("synchronize raises:", raises(torch.npu.synchronize))
            print("records that ran:", ascend.count("record") - records)
        """)
        assert printed[-5:] == [
            "launch raises: False",
            "a later record raises: False",
            "a later launch raises: False",
            "synchronize raises: False",
            "records that ran: 0",
        ]

    @pytest.mark.slow
    def test_a_failed_record_is_raised_by_the_next_launch_and_its_event_is_ready(self, ascend: Simulator) -> None:
        printed = in_process(f"""
            fresh = torch.Event(device="npu", enable_timing=True)
            ascend.fail("record", {DEVICE_ERROR})
            print("record raises:", raises(fresh.record))
            until(lambda: ascend.count("record") == 2)
            time.sleep(0.05)
            until(lambda: raises(lambda: torch.npu._sleep(1000)))
            print("event is ready:", fresh.query())
        """)
        assert printed[-2:] == ["record raises: False", "event is ready: True"]

    def test_a_failing_query_raises(self, ascend: Simulator) -> None:
        event, _ = finished_pair(ascend)
        ascend.fail("query", DEVICE_ERROR)
        with pytest.raises(RuntimeError, match=str(DEVICE_ERROR)):
            event.query()
        assert event.query()


class TestClocks:
    def test_the_hosts_timeline_is_pythons_performance_counter(self, ascend: Simulator) -> None:
        before = time.perf_counter_ns()
        now = ascend.now_ns()
        assert before <= now <= time.perf_counter_ns()

    def test_timestamps_show_the_offset_of_the_devices_clock(self, ascend: Simulator) -> None:
        event = new_event()
        ascend.manual_clock(True)
        ascend.set_clock(0, offset_microseconds=5e9, drift_ppm=0)
        event.record()
        synchronize()
        assert timestamp_us(event) == pytest.approx(ascend.now_ns() / 1000 + 5e9, abs=1)

    def test_durations_show_the_drift_of_the_devices_clock(self, ascend: Simulator) -> None:
        ascend.set_clock(0, offset_microseconds=0, drift_ppm=1000)
        start, end = finished_pair(ascend, 20 * MILLISECOND)
        assert elapsed_us(start, end) == pytest.approx(20_020, abs=0.1)

    def test_a_device_reset_restarts_its_clock_and_leaves_old_timestamps(self, ascend: Simulator) -> None:
        before, _ = finished_pair(ascend)
        old, other_device = timestamp_us(before), ascend.device_ns(1)
        ascend.manual_clock(True)
        ascend.reset_device(0)
        after, _ = finished_pair(ascend)
        assert timestamp_us(after) == 0
        assert timestamp_us(before) == old
        assert ascend.device_ns(1) >= other_device

    def test_the_truth_log_holds_what_the_timestamps_say(self, ascend: Simulator) -> None:
        ascend.set_clock(0, offset_microseconds=7e9, drift_ppm=40)
        ascend.truth_start(10)
        first, second = finished_pair(ascend)
        second_before = timestamp_us(second)
        second.record()
        synchronize()
        ascend.truth_stop()
        first.record()
        synchronize()
        truth = ascend.truth()
        assert [entry.event_handle for entry in truth] == [first.event_id, second.event_id, second.event_id]
        assert {entry.device for entry in truth} == {0}
        assert truth[1].host_ns - truth[0].host_ns == MILLISECOND
        assert truth[1].device_ns - truth[0].device_ns == MILLISECOND + 40
        assert truth[1].device_ns == pytest.approx(second_before * 1000, abs=1020)
        assert truth[2].device_ns == pytest.approx(timestamp_us(second) * 1000, abs=1020)

    def test_the_truth_log_leaves_out_what_has_not_been_executed(self, ascend: Simulator) -> None:
        event = new_event()
        ascend.truth_start(10)
        hung = ascend.hold(stream_pointer())
        event.record()
        stream_pointer()
        assert ascend.truth() == []
        ascend.release(hung)
        synchronize()
        assert [entry.event_handle for entry in ascend.truth()] == [event.event_id]
