"""The relay's life: one for a process tree, in a private folder, from the first client to the last."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.helpers.traced import PATIENCE_SECONDS, Programs, eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.helpers.receiver import Receiver, Span

pytestmark = pytest.mark.slow

needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
NOBODY = 65534


@pytest.fixture
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Programs]:
    """In a folder with a short name: in a folder of its folder multiprocessing's fork server has its socket."""
    with Programs(tmp_path_factory.mktemp("p")) as running:
        yield running


def step_numbers(spans: list[Span]) -> list[int]:
    return sorted(span.attributes["npu.step.number"] for span in spans if span.name == "worker_step")


def dropped(spans: list[Span], reason: str) -> int:
    return sum(span.attributes.get(f"npu.dropped.{reason}", 0) for span in spans)


# Where it runs

PINNED = """
import os, subprocess, sys
from otel_npu.wire import rendezvous

rendezvous.session_id()
cpu = max(os.sched_getaffinity(0))
os.sched_setaffinity(0, {cpu})  # as an engine does with a worker
os.environ |= {"GOMP_CPU_AFFINITY": str(cpu), "OMP_PROC_BIND": "true"}  # as vLLM does on a CPU, and preloads OpenMP
subprocess.run([sys.executable, "-c", '''
import sys
import otel_npu
otel_npu.enable()
with otel_npu.stage("forward"):
    pass
print(otel_npu.flush(20), flush=True)
sys.stdin.read()
'''])
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="there is one processor only")
def test_it_is_not_pinned_where_the_worker_that_starts_it_is(programs: Programs, receiver: Receiver) -> None:
    worker = programs.start(receiver.grpc_environment, command=[sys.executable, "-c", PINNED])
    assert worker.line() == "True\n"
    [relay] = programs.relays()
    assert os.sched_getaffinity(relay) == os.sched_getaffinity(0)
    environment = Path(f"/proc/{relay}/environ").read_bytes()
    assert b"GOMP_CPU_AFFINITY" not in environment
    assert b"OMP_PROC_BIND" not in environment


@pytest.mark.parametrize("mask", ["none", "", "0", f"{1 << 5000:x}"])
def test_it_starts_whatever_is_said_of_processors(mask: str, programs: Programs, receiver: Receiver) -> None:
    worker = programs.start({**receiver.grpc_environment, "_OTEL_NPU_CPU_MASK": mask})
    assert worker.ask("steps(1)") == 1
    assert worker.ask("otel_npu.flush(20)") is True


# One for a process tree

FAMILY = """
import json, multiprocessing, os, subprocess, sys
import otel_npu

def trace(name):
    with otel_npu.step(name), otel_npu.stage("forward"):
        pass
    assert otel_npu.flush(20)

if __name__ == "__main__":
    if sys.argv[1:] == ["child"]:
        trace("subprocess")
        sys.exit()
    otel_npu.enable()
    # At once: nothing has been captured yet, and the relay is not there.
    subprocess.run([sys.executable, __file__, "child"], check=True)
    trace("parent")
    for method in ("fork", "spawn", "forkserver"):
        child = multiprocessing.get_context(method).Process(target=trace, args=(method,))
        child.start()
        child.join()
        assert child.exitcode == 0
    print(os.getpid(), flush=True)
    sys.stdin.read()
"""


def test_a_process_tree_has_one_relay_and_each_process_a_resource_of_its_own(
    programs: Programs, receiver: Receiver
) -> None:
    path = programs.folder / "family.py"
    path.write_text(FAMILY)
    parent = programs.start(receiver.grpc_environment, command=[sys.executable, str(path)])
    pid = parent.answer()
    assert len(programs.relays()) == 1
    parent.leave()

    spans = {span.attributes["npu.step.kind"]: span for span in receiver.named("worker_step")}
    assert set(spans) == {"parent", "subprocess", "fork", "spawn", "forkserver"}
    assert len({span.resource["process.pid"] for span in spans.values()}) == 5
    assert len({span.resource["service.instance.id"] for span in spans.values()}) == 5
    assert spans["parent"].resource["process.pid"] == pid
    assert "relay_lost" not in str(receiver.spans)


def test_a_child_inherits_the_session_however_soon_it_starts(programs: Programs) -> None:
    worker = programs.start({"OTEL_TRACES_EXPORTER": "none"})
    # The other thread gets no turn in between.
    answer = worker.ask("(sys.setswitchinterval(100), otel_npu.enable(), os.environ.get('OTEL_NPU_SESSION'))")
    assert len(answer[2]) == 16


def test_ten_processes_that_start_at_once_start_one_relay(programs: Programs, receiver: Receiver) -> None:
    environment = {**receiver.grpc_environment, "OTEL_NPU_SESSION": "ten"}
    workers = [programs.start(environment) for _ in range(10)]
    for worker in workers:
        assert worker.ask("'ready'") == "ready"
    for worker in workers:
        worker.tell("steps(3) and otel_npu.flush(30)")
    assert [worker.answer() for worker in workers] == [True] * 10

    assert len(programs.relays()) == 1
    assert len(programs.sockets) == 1
    assert len({span.resource["process.pid"] for span in receiver.wait_for(30, "worker_step")}) == 10
    assert dropped(receiver.spans, "relay_lost") == 0


# A private folder, the same user only


def goes_another_way(programs: Programs, receiver: Receiver) -> str:
    """What it logged: every span arrives all the same."""
    worker = programs.start(receiver.grpc_environment)
    assert worker.ask("steps(3) and otel_npu.flush(20)") is True
    assert step_numbers(receiver.spans) == [1, 2, 3]
    assert len(programs.relays()) == 1
    return programs.log


def relay_folder(programs: Programs) -> Path:
    return programs.run_folder / f"otel-npu-{os.getuid()}"


def test_the_sockets_folder_is_for_this_user_alone(programs: Programs) -> None:
    worker = programs.start({"OTEL_TRACES_EXPORTER": "none"})
    worker.ask("steps(1)")
    programs.relay()
    status = relay_folder(programs).lstat()
    assert (status.st_mode & 0o777, status.st_uid) == (0o700, os.getuid())


@pytest.mark.parametrize("mode", [0o755, 0o710, 0o777])
def test_a_folder_that_others_can_enter_is_not_used(programs: Programs, receiver: Receiver, mode: int) -> None:
    folder = relay_folder(programs)
    folder.mkdir()
    folder.chmod(mode)
    [line] = goes_another_way(programs, receiver).splitlines()
    assert f"{folder} must be a folder of user {os.getuid()} with mode 0700, and is not" in line
    assert f"the relay's socket is {programs.temporary_folder}/otel-npu-" in line
    assert list(folder.iterdir()) == []


def test_a_symlink_in_the_folders_place_is_not_followed(programs: Programs, receiver: Receiver, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    (elsewhere / "lock").write_text("the user's own")
    relay_folder(programs).symlink_to(elsewhere)
    [line] = goes_another_way(programs, receiver).splitlines()
    assert "must be a folder of user" in line
    assert (elsewhere / "lock").read_text() == "the user's own"


@needs_root
def test_a_folder_of_another_user_is_not_used(programs: Programs, receiver: Receiver) -> None:
    relay_folder(programs).mkdir(mode=0o700)
    os.chown(relay_folder(programs), NOBODY, NOBODY)
    [line] = goes_another_way(programs, receiver).splitlines()
    assert f"must be a folder of user {os.getuid()}" in line


@pytest.mark.parametrize("lock", ["a fifo", "a folder", "a link", "held"])
def test_a_lock_that_can_not_be_had_is_said_and_another_place_taken(
    programs: Programs, receiver: Receiver, tmp_path: Path, lock: str
) -> None:
    folder = relay_folder(programs)
    folder.mkdir(mode=0o700)
    path = folder / "lock"
    with contextlib.ExitStack() as holding:
        if lock == "a fifo":
            os.mkfifo(path)
        elif lock == "a folder":
            path.mkdir()
        elif lock == "a link":
            (tmp_path / "precious").write_text("the user's own")
            path.symlink_to(tmp_path / "precious")
        else:
            fcntl.flock(holding.enter_context(path.open("w")), fcntl.LOCK_EX)
        [line] = goes_another_way(programs, receiver).splitlines()
    assert str(folder) in line
    if lock == "a link":
        assert (tmp_path / "precious").read_text() == "the user's own"


def test_without_any_folder_the_socket_has_an_abstract_name_that_children_find(
    programs: Programs, receiver: Receiver
) -> None:
    for folder in (programs.run_folder, programs.temporary_folder):
        (folder / f"otel-npu-{os.getuid()}").write_text("in the way")
    [line] = goes_another_way(programs, receiver).splitlines()
    assert "the relay's socket is an abstract one" in line


def with_mounts(programs: Programs, mounts: str) -> list[str]:
    """The command of a worker that sees these mounts, it alone."""
    command = ["unshare", "--mount", "sh", "-e", "-c", f'{mounts}; exec "$@"', "sh"]
    if subprocess.run([*command, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("nothing may be mounted here")
    return [*command, sys.executable, str(programs.worker)]


@pytest.mark.parametrize(
    ("mounts", "said"),
    [
        (
            "mount -t tmpfs -o nr_inodes=1 none {run}",
            "otel-npu-{uid}: No space left on device; the relay's socket is {tmp}/",
        ),
        ("mount -t tmpfs -o ro none {run}", ""),
        (
            "mount -o remount,bind,ro /; mount -t tmpfs -o ro none /dev/shm",
            "there is no folder that can be written to; the relay's socket is an abstract one",
        ),
    ],
    ids=["full", "read-only", "a read-only root"],
)
def test_where_nothing_can_be_written_there_is_another_place(
    programs: Programs, receiver: Receiver, mounts: str, said: str
) -> None:
    where = {"run": programs.run_folder, "tmp": programs.temporary_folder, "uid": os.getuid()}
    worker = programs.start(receiver.grpc_environment, command=with_mounts(programs, mounts.format(**where)))
    assert worker.ask("steps(3) and otel_npu.flush(20)") is True
    assert step_numbers(receiver.spans) == [1, 2, 3]
    assert len(programs.relays()) == 1
    assert len(programs.log.splitlines()) == bool(said)
    assert said.format(**where) in programs.log


CHILD = """
import json, os, shutil, subprocess, sys
import otel_npu

def trace(kind):
    with otel_npu.step(kind), otel_npu.stage("forward"):
        pass
    return otel_npu.flush(20)

if len(sys.argv) > 1:
    assert trace("child")
    sys.exit()
assert trace("parent")
run = os.environ["XDG_RUNTIME_DIR"]
changes = {"moved": {"XDG_RUNTIME_DIR": os.environ["ELSEWHERE"], "TMPDIR": os.environ["ELSEWHERE"]}, "removed": {}}
if os.environ["CHANGE"] == "removed":
    shutil.rmtree(run)
subprocess.run([sys.executable, __file__, "child"], env={**os.environ, **changes[os.environ["CHANGE"]]}, check=True)
print(json.dumps("done"), flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("change", ["moved", "removed"])
def test_a_child_finds_the_relay_although_its_folder_is_another_or_gone(
    programs: Programs, receiver: Receiver, tmp_path: Path, change: str
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    path = programs.folder / "parent.py"
    path.write_text(CHILD)
    environment = {**receiver.grpc_environment, "CHANGE": change, "ELSEWHERE": str(elsewhere)}
    parent = programs.start(environment, command=[sys.executable, str(path)])
    assert parent.answer() == "done"
    assert len(programs.relays()) == 1
    assert list(elsewhere.iterdir()) == []
    parent.leave()
    assert {span.attributes["npu.step.kind"] for span in receiver.named("worker_step")} == {"parent", "child"}
    assert programs.log == ""


def test_what_the_relay_holds_is_exported_although_its_folder_has_gone(programs: Programs, receiver: Receiver) -> None:
    worker = programs.start({**receiver.grpc_environment, "OTEL_BSP_SCHEDULE_DELAY": "60000"})
    assert worker.ask("steps(1) and otel_npu.flush(20)") is True
    shutil.rmtree(programs.run_folder)
    worker.ask("steps(200)")
    eventually(lambda: worker.ask("all_is_read()") is True, "the relay has read all")
    worker.process.kill()
    worker.process.wait()
    receiver.wait_for(201, "worker_step")


UMASKED = "import os, runpy, sys; os.umask(int(sys.argv[1], 8)); runpy.run_path(sys.argv[2], run_name='__main__')"


@pytest.mark.parametrize("umask", [0o777, 0o000])
def test_the_umask_is_all_the_same(programs: Programs, receiver: Receiver, umask: int) -> None:
    command = [sys.executable, "-c", UMASKED, f"{umask:o}", str(programs.worker)]
    worker = programs.start(receiver.grpc_environment, command=command)
    assert worker.ask("steps(3) and otel_npu.flush(20)") is True
    assert relay_folder(programs).lstat().st_mode & 0o777 == 0o700
    [socket] = programs.sockets
    assert socket.lstat().st_mode & 0o777 == 0o600


def test_a_path_longer_than_a_sockets_name_may_be_is_no_trouble(programs: Programs, receiver: Receiver) -> None:
    long = programs.run_folder / ("long" * 30)
    long.mkdir()
    environment = {**receiver.grpc_environment, "XDG_RUNTIME_DIR": str(long), "OTEL_NPU_SESSION": "named"}
    first, second = programs.start(environment), programs.start(environment)
    for worker in (first, second):
        assert worker.ask("steps(1) and otel_npu.flush(20)") is True
    assert len(list(long.glob("*/named.sock"))) == 1
    for worker in (first, second):
        worker.leave()
    eventually(lambda: not list(long.glob("*/named.sock")), "the relay has taken its name away")
    assert programs.log == ""


def test_a_session_that_is_no_name_is_refused(programs: Programs) -> None:
    worker = programs.start({"OTEL_NPU_SESSION": "../../etc"})
    assert worker.ask("steps(3)") == 3
    [line] = programs.log.splitlines()
    assert "OTEL_NPU_SESSION='../../etc': takes 1 to 32 letters, digits, '_' or '-'" in line
    assert programs.relays() == []


INTRUDER = """
import os, socket, sys
from otel_npu.wire import frames

os.chdir(os.path.dirname(sys.argv[1]))
os.setuid(int(sys.argv[2]))
connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
connection.connect(os.path.basename(sys.argv[1]))
step = frames.Step(b"1" * 16, b"1" * 8, b"", False, -1, False, 666, "evil", 1, 2, 3, None, None, [], {}, [])
hello = frames.Hello(frames.PROTOCOL, 1, "host", "id", "python", "", "", "cpu", "", 1)
try:
    for frame in (hello, step):
        connection.send(frames.encode(frame))
    connection.settimeout(20)
    answer = connection.recv(1)
except OSError:
    answer = b""
print(len(answer))
"""


@needs_root
def test_a_process_of_another_user_is_turned_away(programs: Programs, receiver: Receiver) -> None:
    worker = programs.start(receiver.grpc_environment)
    worker.ask("steps(1)")
    programs.relay()
    [socket] = eventually(lambda: programs.sockets, "there is a socket")
    # Even if somebody opens the way to it.
    socket.parent.chmod(0o777)
    socket.chmod(0o777)
    intruder = programs.folder / "intruder.py"
    intruder.write_text(INTRUDER)
    other = programs.start(command=[sys.executable, str(intruder), str(socket), str(NOBODY)])
    assert other.answer() == 0  # hung up on
    assert worker.ask("steps(1) and otel_npu.flush(20)") is True

    assert step_numbers(receiver.spans) == [1, 2]
    assert f"refused a connection: the other end of the socket is user {NOBODY}, not 0" in programs.log


@pytest.mark.skipif(sys.version_info < (3, 11), reason="what starts it can't join a process group before Python 3.11")
def test_the_relay_takes_part_in_the_programs_share_of_the_processors(programs: Programs, receiver: Receiver) -> None:
    """Which goes by session where Linux groups by that: a busy program could keep another session waiting for long."""
    worker = programs.start(receiver.grpc_environment)
    assert worker.ask("steps(1) and otel_npu.flush(20)") is True
    assert os.getsid(programs.relay()) == os.getsid(worker.pid)


# From the first client to the last


def test_the_relay_has_a_process_group_of_its_own_and_ignores_what_a_terminal_does(
    programs: Programs, receiver: Receiver
) -> None:
    worker = programs.start(receiver.grpc_environment)
    assert worker.ask("steps(1) and otel_npu.flush(20)") is True
    relay = programs.relay()
    assert os.getpgid(relay) == relay != os.getpgid(worker.pid)
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTTOU):
        os.kill(relay, number)
        assert worker.ask("steps(1) and otel_npu.flush(20)") is True
        assert programs.relay() == relay


def test_the_relay_ends_with_its_last_client(programs: Programs) -> None:
    environment = {"OTEL_TRACES_EXPORTER": "none", "OTEL_NPU_SESSION": "two"}
    first, second = programs.start(environment), programs.start(environment)
    assert first.ask("steps(1) and otel_npu.flush(20)") is True
    assert second.ask("steps(1) and otel_npu.flush(20)") is True
    relay = programs.relay()
    first.leave()
    assert second.ask("steps(1) and otel_npu.flush(20)") is True
    assert programs.relay() == relay
    second.leave()
    eventually(lambda: not programs.relays(), "the relay has ended")
    assert programs.sockets == []
    # No trace of it in the log: neither end is a fault.
    assert programs.log == ""


def test_whoever_started_the_relay_waits_for_its_end(programs: Programs, receiver: Receiver) -> None:
    worker = programs.start(receiver.grpc_environment)
    assert worker.ask("steps(1) and otel_npu.flush(20)") is True
    worker.ask("steps(100)")
    worker.leave()
    assert programs.relays() == []
    assert step_numbers(receiver.spans) == list(range(1, 102))


def test_sigterm_drains_what_was_sent(programs: Programs, receiver: Receiver) -> None:
    worker = programs.start(receiver.grpc_environment)
    assert worker.ask("steps(1) and otel_npu.flush(20)") is True
    relay = programs.relay()
    os.kill(relay, signal.SIGSTOP)
    worker.ask("steps(200)")  # they wait in the socket
    assert eventually(lambda: worker.ask("all_is_sent()"), "all is sent")
    worker.process.kill()
    worker.process.wait()
    os.kill(relay, signal.SIGTERM)
    os.kill(relay, signal.SIGCONT)
    eventually(lambda: not programs.relays(), "the relay has ended")
    assert programs.sockets == []
    assert step_numbers(receiver.spans) == list(range(1, 202))


def test_a_relay_that_is_terminated_under_load_loses_nothing(programs: Programs, receiver: Receiver) -> None:
    worker = programs.start(receiver.grpc_environment)
    assert worker.ask("steps(1) and otel_npu.flush(20)") is True
    first = programs.relay()
    worker.tell("[(steps(1), time.sleep(0.001)) for _ in range(2000)] and 1")
    receiver.wait_for(400)
    os.kill(first, signal.SIGTERM)
    assert worker.answer() == 1
    assert eventually(lambda: worker.ask("otel_npu.flush(20)"), "another relay has the rest")
    assert programs.relay() != first
    assert step_numbers(receiver.spans) == list(range(1, 2002))


def test_a_relay_that_is_killed_is_started_again_and_its_loss_is_counted(
    programs: Programs, receiver: Receiver
) -> None:
    worker = programs.start(receiver.grpc_environment)
    assert worker.ask("steps(1) and otel_npu.flush(20)") is True
    first = programs.relay()
    os.kill(first, signal.SIGKILL)
    eventually(lambda: programs.relays() not in ([], [first]), "the worker has noticed")
    assert worker.ask("steps(5)") == 5
    assert eventually(lambda: worker.ask("otel_npu.flush(20)"), "another relay is there")
    assert programs.relay() != first
    assert step_numbers(receiver.spans) == [1, 2, 3, 4, 5, 6]
    assert dropped(receiver.spans, "relay_lost") == 1
    worker.leave()


def test_who_kills_a_process_and_all_its_descendants_leaves_the_relay(programs: Programs, receiver: Receiver) -> None:
    worker = programs.start(receiver.grpc_environment)
    worker.ask("steps(2)")
    eventually(lambda: worker.ask("recorder()._resolved_and_sent()"), "both are in the relay's socket")
    eventually(lambda: programs.relay() not in descendants(worker.pid), "it is nobody's child")
    for pid in (*descendants(worker.pid), worker.pid):
        os.kill(pid, signal.SIGKILL)
    receiver.wait_for(2, "worker_step")


def descendants(pid: int) -> list[int]:
    """All processes below this one."""
    found: list[int] = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        found += [int(child), *descendants(int(child))]
    return found


def test_what_a_killed_worker_has_sent_arrives(programs: Programs, receiver: Receiver) -> None:
    worker = programs.start(receiver.grpc_environment)
    assert worker.ask("steps(1) and otel_npu.flush(20)") is True
    relay = programs.relay()
    os.kill(relay, signal.SIGSTOP)  # so that nothing has been read when the worker dies
    worker.ask("steps(300)")
    # Resolved and in the socket.
    assert eventually(lambda: worker.ask("recorder()._resolved_and_sent()"), "all is sent")
    worker.process.kill()
    worker.process.wait()
    os.kill(relay, signal.SIGCONT)
    eventually(lambda: not programs.relays(), "the relay has ended")
    assert step_numbers(receiver.spans) == list(range(1, 302))


def test_what_a_worker_has_sent_when_it_is_killed_in_mid_run_arrives(programs: Programs, receiver: Receiver) -> None:
    worker = programs.start(receiver.grpc_environment)
    # First: while the relay starts, more steps run than its socket holds.
    assert worker.ask("steps(1) and otel_npu.flush(20)") is True
    # It says the number of each step once its frame is in the socket, with no other.
    send = "recorder().resolve(recorder().local.thread)"
    worker.tell(
        f"[(steps(1), {send}, recorder()._resolved_and_sent() and print(n, flush=True)) for n in range(2, 10**6)]"
    )
    said = [worker.answer() for _ in range(300)]
    worker.process.kill()
    worker.process.wait()
    eventually(lambda: not programs.relays(), "the relay has ended")
    assert set(said) <= set(step_numbers(receiver.spans))


def test_what_a_worker_has_sent_when_its_terminal_goes_arrives(programs: Programs, receiver: Receiver) -> None:
    terminal, workers_end = os.openpty()
    worker = programs.start(receiver.grpc_environment)
    worker.ask("__import__('signal').signal(1, 0)")  # tests may run under nohup
    worker.ask("os.setsid()")
    worker.ask(f"os.open({os.ttyname(workers_end)!r}, os.O_RDWR)")  # its controlling terminal from now on
    assert worker.ask("steps(1) and otel_npu.flush(20)") is True
    worker.ask("steps(2)")
    assert eventually(lambda: worker.ask("recorder()._resolved_and_sent()"), "all is sent")
    os.close(terminal)
    assert worker.process.wait(PATIENCE_SECONDS) == -signal.SIGHUP
    os.close(workers_end)
    eventually(lambda: not programs.relays(), "the relay has ended")
    assert step_numbers(receiver.spans) == [1, 2, 3]


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_as_the_first_process_of_a_container_an_orderly_exit_loses_nothing(
    programs: Programs, receiver: Receiver, protocol: str
) -> None:
    """When PID 1 of a PID namespace ends, the kernel kills all that is left in it, the relay too."""
    namespace = ["unshare", "--pid", "--fork", "--mount-proc"]
    if subprocess.run([*namespace, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("a PID namespace may not be made here")
    worker = programs.start(
        receiver.grpc_environment if protocol == "grpc" else receiver.http_environment,
        command=[*namespace, sys.executable, str(programs.worker)],
    )
    assert worker.ask("os.getpid()") == 1
    assert worker.ask("steps(1) and otel_npu.flush(20)") is True
    worker.ask("steps(500)")
    worker.leave()
    assert step_numbers(receiver.spans) == list(range(1, 502))


# What it is made of


def memory_map(pid: int) -> str:
    return Path(f"/proc/{pid}/maps").read_text()


def status(pid: int, key: str) -> int:
    [line] = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith(key)]
    return int(line.split()[1])


def test_the_relay_is_small_and_without_torch(programs: Programs, receiver: Receiver) -> None:
    worker = programs.start(receiver.grpc_environment)
    for _ in range(10):
        assert worker.ask("steps(500) and otel_npu.flush(30)") is True
    receiver.wait_for(10_000)
    relay = programs.relay()
    assert "torch" not in memory_map(relay)
    assert status(relay, "VmRSS") < 80 * 1024


@pytest.mark.skipif(sys.version_info < (3, 11), reason="PYTHONSAFEPATH is new in Python 3.11")
def test_a_module_in_the_working_directory_does_not_take_the_place_of_the_relays(programs: Programs) -> None:
    folder = programs.folder / "elsewhere"
    folder.mkdir()
    for name in ("grpc", "msgspec", "opentelemetry", "otel_npu"):
        (folder / f"{name}.py").write_text("raise SystemExit('shadowed')")
    worker = programs.start({"OTEL_TRACES_EXPORTER": "none"}, cwd=folder)
    assert worker.ask("steps(1) and otel_npu.flush(20)") is True
    assert programs.log == ""


# The same on a thread


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_in_process_the_same_code_runs_on_a_thread(programs: Programs, receiver: Receiver, protocol: str) -> None:
    endpoint: dict[str, Any] = receiver.grpc_environment if protocol == "grpc" else receiver.http_environment
    worker = programs.start({**endpoint, "OTEL_NPU_EXPORT": "inprocess"})
    assert worker.ask("steps(10) and otel_npu.flush(20)") is True
    assert programs.relays() == []
    assert step_numbers(receiver.spans) == list(range(1, 11))
    worker.ask("steps(10)")
    worker.leave()
    assert step_numbers(receiver.spans) == list(range(1, 21))
    assert {span.resource["process.pid"] for span in receiver.spans} == {worker.pid}
