"""Processes that a traced process starts: each is traced by itself, with a resource of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.helpers.receiver import Receiver, Span

ENABLED = {"OTEL_NPU_ENABLED": "1", "OTEL_NPU_DEVICE": "cpu", "OTEL_NPU_STEPS_PER_SECOND": "all"}

FORK = """
    import os, sys
    import otel_npu

    def in_child(body):
        pid = os.fork()
        if not pid:
            try:
                body()
            finally:
                os._exit(0 if sys.exc_info()[0] is None else 1)
        assert os.waitpid(pid, 0)[1] == 0

    def stage(name):
        with otel_npu.step(), otel_npu.stage(name):
            pass
"""


def each_by_itself(receiver: Receiver, *names: str) -> dict[str, Span]:
    """The stages of these names, once each, with a step and a process of their own."""
    for name in names:
        receiver.wait_for(1, name)
    spans = {span.name: span for span in receiver.spans if span.name != "worker_step"}
    assert set(spans) == set(names)
    assert len([span for span in receiver.spans if span.name != "worker_step"]) == len(names)
    return spans


def processes(spans: dict[str, Span]) -> dict[str, tuple[int, str]]:
    return {name: (span.resource["process.pid"], span.resource["service.instance.id"]) for name, span in spans.items()}


def test_a_forked_child_is_traced_by_itself_and_its_parent_goes_on(
    receiver: Receiver, run_program: Callable[..., Any]
) -> None:
    run_program(
        FORK
        + """
    def child():
        stage("child")
        assert otel_npu.flush(20)
        otel_npu.disable()

    stage("before")
    in_child(child)
    stage("after")
    in_child(lambda: None)
    assert otel_npu.flush(20)
    """,
        {**ENABLED, **receiver.grpc_environment},
    )
    seen = processes(each_by_itself(receiver, "before", "child", "after"))
    assert seen["before"] == seen["after"]
    assert seen["child"][0] != seen["before"][0]
    assert seen["child"][1] != seen["before"][1]
    assert len({span.trace_id for span in receiver.spans}) == 3


def test_a_child_is_traced_even_if_its_parent_was_off_before(
    receiver: Receiver, run_program: Callable[..., Any]
) -> None:
    run_program(
        FORK
        + """
    def child():
        with otel_npu.stage("child"):
            pass
        assert otel_npu.flush(20)
        otel_npu.disable()

    with otel_npu.stage("child"):
        pass
    assert otel_npu.enable()
    in_child(child)
    """,
        {**ENABLED, "OTEL_NPU_ENABLED": "0", **receiver.grpc_environment},
    )
    each_by_itself(receiver, "child")


def test_a_child_whose_parent_is_off_is_off(run_program: Callable[..., Any]) -> None:
    run_program(
        FORK
        + """
    def child():
        stage("child")
        from otel_npu.capture import switch
        assert switch.current_recorder() is None

    stage("parent")
    in_child(child)
    """
    )


def test_a_stage_and_a_step_that_are_open_while_the_process_forks_do_no_harm(
    receiver: Receiver, run_program: Callable[..., Any]
) -> None:
    run_program(
        FORK
        + """
    pid = None
    with otel_npu.step(), otel_npu.stage("parent"):
        pid = os.fork()
    if not pid:
        stage("child")
        otel_npu.disable()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert otel_npu.flush(20)
    """,
        {**ENABLED, **receiver.grpc_environment},
    )
    seen = processes(each_by_itself(receiver, "parent", "child"))
    assert seen["parent"] != seen["child"]


def test_nobody_forks_while_another_thread_turns_tracing_on(run_program: Callable[..., Any]) -> None:
    """The child would have its locks for ever: `tempfile`'s, an import's."""
    run_program(
        """
    import os, signal, threading, time
    from otel_npu.capture import switch

    held, begun = threading.Lock(), threading.Event()
    begin = switch._begin

    def slowly(*given):
        with held:
            begun.set()
            time.sleep(1)
            return begin(*given)

    switch._begin = slowly
    thread = threading.Thread(target=switch.enable)
    thread.start()
    begun.wait()
    pid = os.fork()
    if not pid:
        os._exit(not held.acquire(timeout=5))
    assert os.waitpid(pid, 0)[1] == 0, "the child has inherited a lock"
    thread.join()
    assert switch.current_recorder() is not None
    for _ in range(2):  # whoever forks lets go of ours again, and may fork in the midst of it
        with switch.settling():
            if not os.fork():
                with switch.settling():
                    os._exit(0)
        assert os.wait()[1] == 0
    other = threading.Thread(target=switch.disable)
    other.start()
    other.join(20)
    assert not other.is_alive()
    """,
        {"OTEL_NPU_DEVICE": "cpu", "OTEL_TRACES_EXPORTER": "none"},
    )


def test_a_program_forks_although_turning_tracing_on_comes_to_no_end(run_program: Callable[..., Any]) -> None:
    run_program(
        """
    import os, threading
    from otel_npu.capture import switch

    switch._FORK_SECONDS = 0.1
    held, done = threading.Event(), threading.Event()

    def for_ever():
        with switch.settling():
            held.set()
            done.wait()

    thread = threading.Thread(target=for_ever)
    thread.start()
    held.wait()
    if not os.fork():
        switch.enable()
        os._exit(0)
    assert os.wait()[1] == 0
    done.set()
    thread.join()
    """,
        {"OTEL_NPU_DEVICE": "cpu", "OTEL_TRACES_EXPORTER": "none"},
    )


def test_the_ids_of_a_forked_child_are_its_own(run_program: Callable[..., Any]) -> None:
    run_program(
        """
    import os
    from otel_npu.ids import new_bytes

    reading, writing = os.pipe()
    for _ in range(3):
        if not os.fork():
            os.write(writing, new_bytes(16))
            os._exit(0)
        os.wait()
    ids = [new_bytes(16), *(os.read(reading, 16) for _ in range(3))]
    assert len(set(ids)) == 4
    """
    )


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_what_a_child_of_multiprocessing_has_captured_arrives_when_it_ends(
    method: str, receiver: Receiver, run_program: Callable[..., Any]
) -> None:
    run_program(
        f"""
    import multiprocessing
    import otel_npu

    def work(name):
        with otel_npu.step(), otel_npu.stage(name):
            pass

    if __name__ == "__main__":
        work("parent")
        processes = multiprocessing.get_context({method!r})
        children = [processes.Process(target=work, args=(f"child {{number}}",)) for number in range(2)]
        for child in children:
            child.start()
        for child in children:
            child.join()
            assert child.exitcode == 0
        assert otel_npu.flush(20)
    """,
        {**ENABLED, **receiver.grpc_environment},
    )
    spans = each_by_itself(receiver, "parent", "child 0", "child 1")
    assert len(set(processes(spans).values())) == 3
    assert {span.resource["service.name"] for span in spans.values()} == {"unknown_service:python"}
