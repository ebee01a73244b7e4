"""The relay in a container of its own, as `deploy/kubernetes` has it: what it says there is what is run here."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from otel_npu.wire import rendezvous
from tests.helpers import manifests
from tests.helpers.traced import Program, Programs, eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.helpers.receiver import Receiver

pytestmark = pytest.mark.slow

POD: Final = manifests.one("vllm", "Deployment", "vllm")["spec"]["template"]["spec"]
SHARED: Final = manifests.config_maps("vllm")["otel-npu"]
RELAY: Final = POD["initContainers"][0]
SERVER: Final = POD["containers"][0]
# A container's processes see only each other, and die with the first of them.
CONTAINER: Final = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]


@pytest.fixture
def programs(tmp_path: Path) -> Iterator[Programs]:
    if subprocess.run([*CONTAINER, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("a PID namespace may not be made here")
    with Programs(tmp_path) as running:
        # As an emptyDir is where the pod has an fsGroup.
        running.run_folder.chmod(0o2777)
        yield running


def shared(programs: Programs) -> dict[str, str]:
    """What both containers have in their environment, with the pod's folder where it is here."""
    return {**SHARED, "XDG_RUNTIME_DIR": str(programs.run_folder)}


def start_relay(programs: Programs, receiver: Receiver) -> Program:
    """The sidecar; it is up once its startup probe says so."""
    command = [str(Path(sys.executable).with_name(RELAY["command"][0])), *RELAY["command"][1:]]
    relay = programs.start({**shared(programs), **receiver.grpc_environment}, command=[*CONTAINER, *command])
    eventually(lambda: probe(programs), "the relay's startup probe succeeds")
    return relay


def probe(programs: Programs) -> bool:
    user = POD["securityContext"]["runAsUser"]
    there = {f"{SHARED['XDG_RUNTIME_DIR']}/otel-npu-{user}/": f"{programs.run_folder}/otel-npu-{os.getuid()}/"}
    command = RELAY["startupProbe"]["exec"]["command"]
    for theirs, ours in there.items():
        command = [argument.replace(theirs, ours) for argument in command]
    return subprocess.run(command, check=False).returncode == 0


def start_server(programs: Programs) -> Program:
    """A traced program with the server's environment. A relay of its own would export nothing."""
    environment = {entry["name"]: entry["value"] for entry in SERVER["env"] if "value" in entry}
    del environment["HOME"]
    attributes = environment["OTEL_RESOURCE_ATTRIBUTES"]
    for name in ("POD_NAMESPACE", "POD_NAME", "NODE_NAME"):
        attributes = attributes.replace(f"$({name})", name.lower())
    return programs.start(
        {
            **shared(programs),
            **environment,
            "OTEL_RESOURCE_ATTRIBUTES": attributes,
            "OTEL_TRACES_EXPORTER": "none",
        },
        command=[*CONTAINER, sys.executable, str(programs.worker)],
    )


def first_process(container: Program) -> int:
    """The first process in a container, as it is numbered outside."""
    [pid] = Path(f"/proc/{container.pid}/task/{container.pid}/children").read_text().split()
    return int(pid)


def test_the_last_spans_survive_the_servers_container(programs: Programs, receiver: Receiver) -> None:
    relay = start_relay(programs, receiver)
    server = start_server(programs)
    assert server.ask("os.getpid()") == 1
    server.ask("steps(100)")
    assert eventually(lambda: server.ask("recorder()._resolved_and_sent()"), "all is sent")
    os.kill(first_process(server), signal.SIGKILL)
    server.process.wait()

    steps = receiver.wait_for(100, "worker_step")
    assert len(steps) == 100
    assert programs.relays() == []  # it has met the sidecar and started none
    resource = steps[0].resource
    assert resource["service.name"] == "vllm"
    assert resource["k8s.pod.name"] == "pod_name"
    assert relay.process.poll() is None


def test_a_server_that_is_started_again_meets_the_same_relay(programs: Programs, receiver: Receiver) -> None:
    relay = start_relay(programs, receiver)
    for count in (3, 6):
        server = start_server(programs)
        assert server.ask("steps(3) and otel_npu.flush(20)") is True
        assert len(receiver.wait_for(count, "worker_step")) == count
        os.kill(first_process(server), signal.SIGKILL)
        server.process.wait()
    assert programs.relays() == []
    assert relay.process.poll() is None


def test_the_relay_ends_with_the_pod_when_all_is_sent(programs: Programs, receiver: Receiver) -> None:
    relay = start_relay(programs, receiver)
    server = start_server(programs)
    assert server.ask("steps(100)") == 100
    assert eventually(lambda: server.ask("recorder()._resolved_and_sent()"), "all is sent")
    os.kill(first_process(server), signal.SIGKILL)
    server.process.wait()
    os.kill(first_process(relay), signal.SIGTERM)
    assert relay.process.wait(120) == 0
    assert len(receiver.named("worker_step")) == 100
    assert not probe(programs)


def test_a_relay_that_was_killed_waits_for_the_one_that_the_server_has_started(
    programs: Programs, receiver: Receiver
) -> None:
    """It must not fail meanwhile: a sidecar that is not ready would take the server out of its service."""
    first = start_relay(programs, receiver)
    server = start_server(programs)
    assert server.ask("steps(1) and otel_npu.flush(20)") is True
    os.kill(first_process(first), signal.SIGKILL)
    first.process.wait()
    programs.relay()
    second = start_relay(programs, receiver)
    eventually(lambda: "waiting for its end" in programs.log, "it waits")
    assert server.ask("steps(1) and otel_npu.flush(20)") is False  # it can't know what the killed one still held
    assert server.ask("steps(1) and otel_npu.flush(20)") is True
    assert len(programs.relays()) == 1

    os.kill(first_process(server), signal.SIGKILL)
    server.process.wait()
    eventually(lambda: serves(programs), "it serves")
    assert start_server(programs).ask("steps(2) and otel_npu.flush(20)") is True
    assert len(receiver.wait_for(3, "worker_step")) == 3  # the stand-in has exported nothing here
    assert programs.relays() == []
    assert second.process.poll() is None


def test_a_relay_that_waits_ends_with_the_pod(programs: Programs, receiver: Receiver) -> None:
    start_relay(programs, receiver)
    second = start_relay(programs, receiver)
    eventually(lambda: "waiting for its end" in programs.log, "it waits")
    os.kill(first_process(second), signal.SIGTERM)
    assert second.process.wait(120) == 0
    assert probe(programs)


def serves(programs: Programs) -> bool:
    """Whether a relay answers."""
    path = programs.run_folder / f"otel-npu-{os.getuid()}" / f"{SHARED['OTEL_NPU_SESSION']}.sock"
    connection = rendezvous.connect(path)
    if connection is not None:
        connection.close()
    return connection is not None
