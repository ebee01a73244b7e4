"""The configurations of the collectors under `deploy/`, and the check that they are put to."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Final

import pytest
import yaml

from tests.helpers import REPOSITORY, collector_config

if TYPE_CHECKING:
    from collections.abc import Callable

CONFIGURATIONS: Final = [
    "compose/collector.yaml",
    "compose/jaeger.yaml",
    "kubernetes/collectors/agent-config.yaml",
    "kubernetes/collectors/gateway-config.yaml",
]


def configuration(name: str) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((REPOSITORY / "deploy" / name).read_text())
    return config


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_collector_would_take_its_configuration(name: str) -> None:
    assert collector_config.problems(configuration(name)) == []


@pytest.mark.parametrize("name", [name for name in CONFIGURATIONS if "jaeger" not in name])
def test_what_a_collector_holds_is_bounded_batched_and_tried_again(name: str) -> None:
    config = configuration(name)
    pipelines = config["service"]["pipelines"]
    assert set(pipelines) == {"traces", "metrics"}
    assert all(pipeline["processors"][0] == "memory_limiter" for pipeline in pipelines.values())
    for exporter in config["exporters"].values():
        queue = exporter["sending_queue"]
        assert queue["sizer"] == "bytes"
        # What a gRPC receiver takes by default is 4 MiB.
        assert queue["batch"]["max_size"] < 4 * 1024 * 1024
        assert "max_elapsed_time" in exporter["retry_on_failure"]


def test_the_gateways_queue_outlives_it() -> None:
    [exporter] = configuration("kubernetes/collectors/gateway-config.yaml")["exporters"].values()
    assert exporter["sending_queue"]["storage"] == "file_storage"


FAULTS: Final[dict[str, Callable[[dict[str, Any]], Any]]] = {
    "exporters.otlp_grpc.sending_queue.queue_sise: no such key": (
        lambda c: c["exporters"]["otlp_grpc"]["sending_queue"].update(queue_sise=1)
    ),
    "receivers.otlp.protocols.grpc.endpoint: is '0.0.0.0' and not an address with a port": (
        lambda c: c["receivers"]["otlp"]["protocols"]["grpc"].update(endpoint="0.0.0.0")
    ),
    "processors.memory_limiter.check_interval: is 1 and not a duration such as 1s": (
        lambda c: c["processors"]["memory_limiter"].update(check_interval=1)
    ),
    "processors.memory_limiter: spike_limit_percentage must be below limit_percentage": (
        lambda c: c["processors"]["memory_limiter"].update(spike_limit_percentage=80)
    ),
    "processors.memory_limiter.check_interval: is missing": (
        lambda c: c["processors"]["memory_limiter"].pop("check_interval")
    ),
    "exporters.otlp: no such component": lambda c: c["exporters"].update(otlp={}),
    "procesors: no such section": lambda c: c.update(procesors={}),
    "exporters.otlp_grpc/2: is defined and not used": (
        lambda c: c["exporters"].update({"otlp_grpc/2": {"endpoint": "a:1"}})
    ),
    "receivers.otlp/2: is used and not defined": (
        lambda c: c["service"]["pipelines"]["traces"]["receivers"].append("otlp/2")
    ),
    "exporters.otlp_grpc: its queue is stored in file_storage, which is no extension in use": (
        lambda c: c["service"]["extensions"].remove("file_storage")
    ),
    "service.pipelines.trace: no such signal": lambda c: c["service"]["pipelines"].update(trace={}),
    "service.pipelines.traces.exporters: is missing": lambda c: c["service"]["pipelines"]["traces"].pop("exporters"),
    "exporters.otlp_grpc: max_size is below min_size": (
        lambda c: c["exporters"]["otlp_grpc"]["sending_queue"]["batch"].update(max_size=1)
    ),
    "exporters.otlp_grpc: the queue can't hold one batch": (
        lambda c: c["exporters"]["otlp_grpc"]["sending_queue"].update(queue_size=1)
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(fault: str) -> None:
    config = copy.deepcopy(configuration("kubernetes/collectors/gateway-config.yaml"))
    FAULTS[fault](config)
    assert fault in collector_config.problems(config)
