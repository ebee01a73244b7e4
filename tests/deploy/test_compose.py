"""`deploy/compose`: valid, whole, open to this machine only, and wired from the demo to both stores."""

from __future__ import annotations

import json
import re
from importlib import resources
from typing import Any, Final

import pytest
import yaml

from otel_npu import semconv
from tests.helpers import REPOSITORY
from tests.helpers.manifests import values

jsonschema = pytest.importorskip("jsonschema")
FOLDER: Final = REPOSITORY / "deploy/compose"
COMPOSE: Final[dict[str, Any]] = yaml.safe_load((FOLDER / "compose.yaml").read_text())
SERVICES: Final[dict[str, dict[str, Any]]] = COMPOSE["services"]
BUILT: Final = {name for name, service in SERVICES.items() if "build" in service}

# What is documented of Grafana's and Tempo's files, as far as it is used here.
DATASOURCE_KEYS: Final = {
    *("name", "type", "access", "orgId", "uid", "url", "user", "database", "basicAuth", "basicAuthUser"),
    *("withCredentials", "isDefault", "jsonData", "secureJsonData", "version", "editable"),
}
JSON_DATA_KEYS: Final = {
    *("httpMethod", "timeout", "nodeGraph", "serviceMap", "tracesToLogsV2", "tracesToMetrics", "tracesToProfiles"),
    *("search", "spanBar", "streamingEnabled", "traceQuery", "exemplarTraceIdDestinations"),
}
TEMPO_KEYS: Final = {
    "server": {"http_listen_port", "http_listen_address", "grpc_listen_port", "grpc_listen_address", "log_level"},
    "distributor": {"receivers"},
    "query_frontend": {"search", "metrics", "trace_by_id"},
    "storage": {"trace"},
    "overrides": {"defaults", "per_tenant_override_config"},
    "usage_report": {"reporting_enabled"},
}


def read(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((FOLDER / name).read_text())
    return loaded


def schema() -> Any:
    package = pytest.importorskip("check_jsonschema")
    path = resources.files(package).joinpath("builtin_schemas/vendor/compose-spec.json")
    return jsonschema.Draft202012Validator(json.loads(path.read_text()))


def test_it_follows_the_compose_specification() -> None:
    assert [error.message for error in schema().iter_errors(COMPOSE)] == []


def test_a_misspelt_key_is_found() -> None:
    broken = {**COMPOSE, "services": {**SERVICES, "jaeger": {**SERVICES["jaeger"], "imagee": "x"}}}
    assert "imagee" in " ".join(error.message for error in schema().iter_errors(broken))


def test_every_file_is_there_and_used() -> None:
    used = {"compose.yaml", "Dockerfile", "Dockerfile.dockerignore"}
    for service in SERVICES.values():
        for volume in service.get("volumes", []):
            source, _target, *mode = volume.split(":")
            if source.startswith("./"):
                assert mode == ["ro"]
                used.add(source.removeprefix("./"))
            else:
                assert source in COMPOSE["volumes"]
    files = {str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*") if path.is_file()}
    folders = {name for name in used if (FOLDER / name).is_dir()}
    assert used - folders == {name for name in files if not name.startswith(tuple(f"{folder}/" for folder in folders))}


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_pinned_unprivileged_and_bounded(name: str) -> None:
    service = SERVICES[name]
    if name not in BUILT:
        assert re.search(r":v?\d+\.\d+\.\d+$", service["image"])
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "privileged" not in service
    assert re.fullmatch(r"\d+[mg]", service["mem_limit"])
    assert set(service.get("depends_on", [])) <= set(SERVICES)


def test_its_ports_are_open_to_this_machine_only() -> None:
    for service in SERVICES.values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))


def mounted(service: str, file: str) -> str:
    """Where a file of this folder lies in a service."""
    [target] = [v.split(":")[1] for v in SERVICES[service]["volumes"] if v.split(":")[0] == f"./{file}"]
    return str(target)


def listening(service: str) -> set[int]:
    """The ports that a service's own configuration opens."""
    config = read(f"{service}.yaml")
    ports = {int(value.rpartition(":")[2]) for value in values(config, "endpoint") if value.startswith("0.0.0.0:")}
    return ports | set(values(config, "http_listen_port"))


@pytest.mark.parametrize("service", ["collector", "jaeger", "tempo"])
def test_a_service_reads_its_configuration(service: str) -> None:
    assert any(argument.endswith(mounted(service, f"{service}.yaml")) for argument in SERVICES[service]["command"])


def test_spans_go_from_the_demo_through_the_collector_to_both() -> None:
    host, port = re.fullmatch(  # type: ignore[union-attr]
        r"http://(\w+):(\d+)", SERVICES["demo"]["environment"]["OTEL_EXPORTER_OTLP_ENDPOINT"]
    ).groups()
    assert int(port) in listening(host)
    exporters = read("collector.yaml")["exporters"]
    assert exporters["otlp_http/prometheus"]["endpoint"].startswith("http://prometheus:9090/")
    assert "--web.enable-otlp-receiver" in SERVICES["prometheus"]["command"]
    targets = [exporter["endpoint"].split(":") for name, exporter in exporters.items() if name.startswith("otlp_grpc")]
    assert {host for host, _port in targets} == {"jaeger", "tempo"}
    for host, port in targets:
        assert int(port) in listening(host)


def test_a_published_port_is_one_that_the_service_opens() -> None:
    for name in ("collector", "jaeger"):
        assert {int(port.rpartition(":")[2]) for port in SERVICES[name]["ports"]} <= listening(name)


def test_grafana_is_provisioned_with_both() -> None:
    assert mounted("grafana", "grafana/datasources.yaml").startswith("/etc/grafana/provisioning/datasources/")
    provisioned = read("grafana/datasources.yaml")
    assert set(provisioned) == {"apiVersion", "datasources"}
    assert provisioned["apiVersion"] == 1
    assert {source["type"] for source in provisioned["datasources"]} == {"tempo", "jaeger", "prometheus"}
    assert len([source for source in provisioned["datasources"] if source.get("isDefault")]) == 1
    for source in provisioned["datasources"]:
        assert set(source) <= DATASOURCE_KEYS
        assert set(source.get("jsonData", {})) <= JSON_DATA_KEYS
        assert source["access"] == "proxy"
        host, port = source["url"].removeprefix("http://").split(":")
        assert host == source["type"]
        assert host == "prometheus" or int(port) in listening(host)


def test_tempo_keeps_and_compares_as_long_as_the_queries_look_back() -> None:
    tempo = read("tempo.yaml")
    for section, settings in tempo.items():
        assert set(settings) <= TEMPO_KEYS[section]
    assert tempo["query_frontend"]["metrics"]["max_duration"] == "48h"
    assert tempo["overrides"]["defaults"]["compaction"]["block_retention"] == "48h"
    assert "24 hours" in (REPOSITORY / "deploy/queries.md").read_text()
    paths = list(values(tempo["storage"], "path"))
    folder = next(volume.split(":")[1] for volume in SERVICES["tempo"]["volumes"] if volume.startswith("tempo:"))
    assert all(path.startswith(f"{folder}/") for path in paths)


# What is built


@pytest.mark.parametrize("dockerfile", ["deploy/compose/Dockerfile", "deploy/kubernetes/Dockerfile"])
def test_a_dockerfile_copies_what_the_package_is_built_from(dockerfile: str) -> None:
    lines = (REPOSITORY / dockerfile).read_text().splitlines()
    copied = {word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]}
    ignored, *allowed = (REPOSITORY / f"{dockerfile}.dockerignore").read_text().splitlines()
    assert ignored == "*"
    assert copied == {line[1:] for line in allowed if line.startswith("!")}
    assert all((REPOSITORY / path).exists() for path in copied)
    for line in lines:
        if line.startswith("FROM "):
            assert re.search(r":v?\d+\.\d+\.\d+", line)


def test_a_build_finds_all_that_the_project_names() -> None:
    tomllib = pytest.importorskip("tomllib", reason="it is new in Python 3.11")
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    needed = {project["project"]["readme"], *project["project"]["license-files"], "pyproject.toml"}
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed.update([*wheel["packages"], *(hook["path"] for hook in wheel["hooks"].values())])
    lines = (FOLDER / "Dockerfile").read_text()
    copied = {word for line in re.findall(r"^COPY (.*)", lines, re.MULTILINE) for word in line.split()[:-1]}
    assert needed == copied
    ignored = (FOLDER / "Dockerfile.dockerignore").read_text().splitlines()
    assert {f"!{name}" for name in needed} <= set(ignored)


def test_whoever_can_be_asked_says_whether_it_is_healthy_on_its_own_port() -> None:
    asked = {
        name: " ".join(service["healthcheck"]["test"]) for name, service in SERVICES.items() if "healthcheck" in service
    }
    assert {"jaeger", "tempo", "grafana"} <= set(asked)
    ports = {"jaeger": 16686, "tempo": read("tempo.yaml")["server"]["http_listen_port"], "grafana": 3000}
    assert all(f"http://127.0.0.1:{port}/" in asked[name] for name, port in ports.items())


def test_grafana_shows_beside_each_span_whose_clock_timed_it() -> None:
    [tempo] = [source for source in read("grafana/datasources.yaml")["datasources"] if source["type"] == "tempo"]
    assert tempo["jsonData"]["spanBar"] == {"type": "Tag", "tag": semconv.TIMING}


def test_the_demos_container_runs_the_demo_as_nobody_special() -> None:
    text = (FOLDER / "Dockerfile").read_text()
    [user] = re.findall(r"^USER (\d+):\d+$", text, re.MULTILINE)
    assert int(user) > 0
    build = SERVICES["demo"]["build"]
    assert (FOLDER / build["context"]).resolve() == REPOSITORY
    assert build["dockerfile"] == "deploy/compose/Dockerfile"
    # That this command is one, and ends on SIGTERM, is shown with the command line.
    assert 'ENTRYPOINT ["otel-npu"]\nCMD ["demo", "--forever"]\n' in text
