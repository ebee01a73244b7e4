"""Each traced process is described as its own OpenTelemetry SDK would describe it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from opentelemetry.sdk.resources import Resource

from otel_npu import semconv
from otel_npu._version import __version__
from otel_npu.relay.resources import resource_of
from tests.helpers.built import hello
from tests.helpers.traced import Programs

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.helpers.receiver import Receiver


@pytest.fixture
def programs(tmp_path: Path) -> Iterator[Programs]:
    with Programs(tmp_path) as running:
        yield running


ENVIRONMENTS = {
    "nothing": {},
    "a service's name": {"OTEL_SERVICE_NAME": "chat"},
    "a name with spaces round it": {"OTEL_SERVICE_NAME": " chat "},
    "a blank name": {"OTEL_SERVICE_NAME": " "},
    "an empty name": {"OTEL_SERVICE_NAME": "", "OTEL_RESOURCE_ATTRIBUTES": "service.name=batch"},
    "a name among the attributes": {"OTEL_RESOURCE_ATTRIBUTES": "service.name=batch,service.namespace=llm"},
    "both": {"OTEL_SERVICE_NAME": "chat", "OTEL_RESOURCE_ATTRIBUTES": "service.name=batch,k8s.pod.name=pod-0"},
    "an empty name among the attributes": {"OTEL_RESOURCE_ATTRIBUTES": "service.name=,a=1"},
    "percent-encoded values": {"OTEL_RESOURCE_ATTRIBUTES": "service.name=chat%20bot,team=a%2Cb%3Dc,town=Z%C3%BCrich"},
    "spaces": {"OTEL_RESOURCE_ATTRIBUTES": " service.name = chat , team = infra "},
    "an equals sign in a value": {"OTEL_RESOURCE_ATTRIBUTES": "token=a=b"},
    "an entry without a value": {"OTEL_RESOURCE_ATTRIBUTES": "nonsense,team=infra,"},
    "a key twice": {"OTEL_RESOURCE_ATTRIBUTES": "team=one,team=two"},
    "an instance's id of the user's": {"OTEL_RESOURCE_ATTRIBUTES": "service.instance.id=pod-0"},
}


@pytest.mark.slow
@pytest.mark.parametrize("environment", ENVIRONMENTS.values(), ids=ENVIRONMENTS)
def test_the_resource_has_all_that_the_processs_own_sdk_would_say(
    programs: Programs, receiver: Receiver, environment: dict[str, str]
) -> None:
    worker = programs.start({**receiver.grpc_environment, **environment})
    own = worker.ask("dict(__import__('opentelemetry.sdk.resources').sdk.resources.Resource.create().attributes)")
    assert worker.ask("steps(1) and otel_npu.flush(20)") is True
    for key in [key for key in own if key.startswith("telemetry.sdk.")]:
        del own[key]  # who made the spans differs
    if "service.instance.id" not in str(environment):
        del own["service.instance.id"]  # the SDK makes one up, and so do we
    resource = receiver.spans[0].resource
    assert {key: resource.get(key) for key in own} == own


def test_the_resource_says_which_process_and_which_device(programs: Programs, receiver: Receiver) -> None:
    worker = programs.start(receiver.grpc_environment)
    assert worker.ask("steps(1) and otel_npu.flush(20)") is True
    resource = receiver.spans[0].resource
    assert resource["process.pid"] == worker.pid
    assert resource["host.name"] == worker.ask("__import__('socket').gethostname()")
    assert resource["npu.device.type"] == "simulated"
    assert resource["npu.device.name"] == "SimulatedNPU"
    assert resource["telemetry.sdk.name"] == "otel-npu"
    assert resource["telemetry.sdk.version"] == __version__
    assert len(resource["service.instance.id"]) == 36


@pytest.mark.slow
def test_bytes_that_are_not_utf8_cost_no_spans(programs: Programs, receiver: Receiver) -> None:
    worker = programs.start({**receiver.grpc_environment, "OTEL_SERVICE_NAME": "Br\udcfcmm"})
    assert worker.ask("steps(1) and otel_npu.flush(20)") is True
    assert receiver.spans[0].resource["service.name"] == "Br\ufffdmm"


def test_the_name_is_the_executables_of_the_process_not_of_the_relay() -> None:
    assert resource_of(hello(executable="/opt/bin/vllm")).attributes["service.name"] == "unknown_service:vllm"
    assert resource_of(hello(executable="")).attributes["service.name"] == "unknown_service"


def test_the_relays_own_environment_adds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "relay")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "only.here=1")
    resource = resource_of(hello(service_name="chat"))
    assert isinstance(resource, Resource)
    assert resource.attributes["service.name"] == "chat"
    assert "only.here" not in resource.attributes


def test_a_process_without_stages_has_no_device() -> None:
    attributes = resource_of(hello(device_kind="", device_name="")).attributes
    assert semconv.DEVICE_TYPE not in attributes
    assert semconv.DEVICE_NAME not in attributes
