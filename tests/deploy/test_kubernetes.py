"""The manifests under `deploy/kubernetes`: valid, whole, without privileges, and at one with each other."""

from __future__ import annotations

import re
import shutil
import subprocess
from typing import Any, Final

import pytest
import yaml

from otel_npu import settings
from otel_npu.settings import Settings
from tests.helpers import REPOSITORY, manifests
from tests.helpers.manifests import FOLDERS, ROOT, Object, containers, objects, values, workloads

kubernetes_validate = pytest.importorskip("kubernetes_validate")

# Sidecars are init containers that stay since 1.29; the second is the newest that is known here.
VERSIONS: Final = ("1.29.0", "1.37.0")
KUSTOMIZATION_KEYS: Final = {"apiVersion", "kind", "namespace", "resources", "configMapGenerator", "images"}
README: Final = (REPOSITORY / "deploy/README.md").read_text()

WORKLOADS: Final = [(folder, workload) for folder in FOLDERS for workload in workloads(folder)]
CONTAINERS: Final = [
    pytest.param(folder, workload, container, id=f"{workload['metadata']['name']}-{container['name']}")
    for folder, workload in WORKLOADS
    for container in containers(workload)
]
each_workload = pytest.mark.parametrize(
    ("folder", "workload"), [pytest.param(*pair, id=pair[1]["metadata"]["name"]) for pair in WORKLOADS]
)
each_container = pytest.mark.parametrize(("folder", "workload", "container"), CONTAINERS)
each_folder = pytest.mark.parametrize("folder", FOLDERS)


# Valid


@pytest.mark.parametrize("version", VERSIONS)
@each_folder
def test_every_object_is_valid_in_the_oldest_and_the_newest_kubernetes(folder: str, version: str) -> None:
    for item in objects(folder):
        # Strict: no key that the schema does not have. There are no custom resources, so nothing is without a schema.
        assert version.startswith(kubernetes_validate.validate(item, version, strict=True))


def test_a_misspelt_key_is_found() -> None:
    deployment = manifests.one("vllm", "Deployment", "vllm")
    deployment["spec"]["template"]["spec"]["containers"][0]["enviroment"] = []
    with pytest.raises(kubernetes_validate.ValidationError, match="enviroment"):
        kubernetes_validate.validate(deployment, VERSIONS[0], strict=True)


@pytest.mark.parametrize("folder", ["", *FOLDERS])
def test_a_kustomization_lists_every_file_beside_it_and_no_other(folder: str) -> None:
    kustomization = manifests.kustomization(folder)
    assert set(kustomization) <= KUSTOMIZATION_KEYS
    assert kustomization["apiVersion"] == "kustomize.config.k8s.io/v1beta1"
    assert kustomization["kind"] == "Kustomization"
    listed = {*kustomization["resources"], "kustomization.yaml"}
    for generator in kustomization.get("configMapGenerator", []):
        assert set(generator) <= {"name", "files", "envs"}
        listed.update(entry.rpartition("=")[2] for entry in [*generator.get("files", []), *generator.get("envs", [])])
    beside = {path.name for path in (ROOT / folder).iterdir() if not path.name.startswith("Dockerfile")}
    assert listed == beside


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl, which has kustomize in it, is not installed")
def test_kustomize_builds_what_the_files_say() -> None:
    done = subprocess.run(["kubectl", "kustomize", ROOT], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr == ""
    built = list(yaml.safe_load_all(done.stdout))
    for item in built:
        kubernetes_validate.validate(item, VERSIONS[0], strict=True)
        if item["kind"] != "Namespace":
            assert item["metadata"]["namespace"] in ("otel-collectors", "llm")
    kinds = sorted(item["kind"] for item in built)
    generated = sum(len(manifests.config_maps(folder)) for folder in FOLDERS)
    assert kinds == sorted([*(item["kind"] for f in FOLDERS for item in objects(f)), *["ConfigMap"] * generated])
    assert all(":" in image and not image.endswith(":latest") for image in values(built, "image"))
    made = {item["metadata"]["name"] for item in built if item["kind"] == "ConfigMap"}
    asked_for = {source["name"] for key in ("configMap", "configMapRef") for source in values(built, key)}
    assert asked_for == made


# Whole


@each_folder
def test_the_namespace_is_made_and_holds_its_pods_to_the_restricted_standard(folder: str) -> None:
    [namespace] = [item for item in objects(folder) if item["kind"] == "Namespace"]
    assert namespace["metadata"]["name"] == manifests.kustomization(folder)["namespace"]
    assert namespace["metadata"]["labels"] == {"pod-security.kubernetes.io/enforce": "restricted"}


@each_workload
def test_what_a_pod_refers_to_is_made_here_or_asked_for_in_the_readme(folder: str, workload: Object) -> None:
    made = manifests.config_maps(folder)
    for source in [*values(workload, "configMap"), *values(workload, "configMapRef")]:
        assert source["name"] in made
    accounts = {item["metadata"]["name"] for item in objects(folder) if item["kind"] == "ServiceAccount"}
    assert workload["spec"]["template"]["spec"]["serviceAccountName"] in accounts
    for secret in values(workload, "secretKeyRef"):
        assert f"create secret generic {secret['name']} " in README
        assert f"--from-literal={secret['key']}=" in README
    for claim in values(workload, "persistentVolumeClaim"):
        assert f"`{claim['claimName']}`" in README


@each_container
def test_every_volume_that_is_mounted_is_there(folder: str, workload: Object, container: Object) -> None:
    pod = workload["spec"]["template"]["spec"]
    there = {volume["name"] for volume in pod["volumes"]}
    there.update(claim["metadata"]["name"] for claim in workload["spec"].get("volumeClaimTemplates", []))
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted <= there


@each_container
def test_every_image_is_pinned_by_version(folder: str, workload: Object, container: Object) -> None:
    pinned = {image["name"]: image["newTag"] for image in manifests.kustomization(folder)["images"]}
    assert re.fullmatch(r"v?\d+\.\d+\.\d+", pinned[container["image"]])


@each_folder
def test_services_and_policies_are_about_pods_that_exist(folder: str) -> None:
    pods = {
        item["spec"]["template"]["metadata"]["labels"]["app.kubernetes.io/name"]: item for item in workloads(folder)
    }
    for item in objects(folder):
        if item["kind"] == "Service":
            pod = pods[item["spec"]["selector"]["app.kubernetes.io/name"]]
            named = {port["name"] for container in containers(pod) for port in container.get("ports", [])}
            assert {port["targetPort"] for port in item["spec"]["ports"]} <= named
        if item["kind"] in ("NetworkPolicy", "PodDisruptionBudget"):
            selector = item["spec"].get("podSelector", item["spec"].get("selector"))
            assert not selector or selector["matchLabels"]["app.kubernetes.io/name"] in pods
        if item["kind"] in ("Deployment", "DaemonSet", "StatefulSet"):
            assert item["spec"]["selector"]["matchLabels"] == item["spec"]["template"]["metadata"]["labels"]


# Without privileges


@each_container
def test_a_container_has_no_privileges(folder: str, workload: Object, container: Object) -> None:
    pod = workload["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
    assert not list(values(pod, "hostPath"))
    assert not list(values(pod, "hostPort"))
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


@each_container
def test_a_container_has_bounded_memory(folder: str, workload: Object, container: Object) -> None:
    resources = container["resources"]
    assert resources["limits"]["memory"] == resources["requests"]["memory"]


@each_folder
def test_no_traffic_is_allowed_but_what_a_policy_names(folder: str) -> None:
    policies = [item for item in objects(folder) if item["kind"] == "NetworkPolicy"]
    [denied] = [item for item in policies if item["metadata"]["name"] == "default-deny"]
    assert denied["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    for policy in policies:
        for rule in [*policy["spec"].get("ingress", []), *policy["spec"].get("egress", [])]:
            assert rule["ports"]
    for workload in workloads(folder):
        assert workload["metadata"]["name"] in {item["metadata"]["name"] for item in policies}


def test_no_secret_is_in_the_files() -> None:
    assert not [item for folder in FOLDERS for item in objects(folder) if item["kind"] == "Secret"]
    gateway = yaml.safe_load(manifests.config_maps("collectors")["gateway"]["config.yaml"])
    assert all(value.startswith("${env:") for headers in values(gateway, "headers") for value in headers.values())


# At one with each other


@pytest.mark.parametrize(
    ("_folder", "workload", "container"), [each for each in CONTAINERS if "collector" in str(each.id)]
)
def test_a_collectors_configuration_finds_what_it_asks_for(_folder: str, workload: Object, container: Object) -> None:
    text = manifests.config_maps("collectors")[workload["metadata"]["name"]]["config.yaml"]
    config = yaml.safe_load(text)
    [argument] = container["args"]
    folders = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert argument == f"--config={folders['config']}/config.yaml"
    assert set(re.findall(r"\$\{env:(\w+)\}", text)) == {entry["name"] for entry in container.get("env", [])}
    for storage in values(config, "directory"):
        assert storage == folders["queue"]
    listens = {int(endpoint.rpartition(":")[2]) for endpoint in values(config["receivers"], "endpoint")}
    listens.add(int(config["extensions"]["health_check"]["endpoint"].rpartition(":")[2]))
    assert listens == {port["containerPort"] for port in container["ports"]}


def test_the_gateways_queue_fits_its_volume() -> None:
    gateway = manifests.one("collectors", "StatefulSet", "gateway")
    [claim] = gateway["spec"]["volumeClaimTemplates"]
    size = re.fullmatch(r"(\d+)Gi", claim["spec"]["resources"]["requests"]["storage"])
    assert size is not None
    config = yaml.safe_load(manifests.config_maps("collectors")["gateway"]["config.yaml"])
    # Twice: a compaction writes the file anew beside the old one.
    assert 2 * config["exporters"]["otlp_grpc"]["sending_queue"]["queue_size"] < int(size[1]) << 30


def test_spans_find_their_way_from_the_server_to_the_gateway() -> None:
    namespace = manifests.kustomization("collectors")["namespace"]
    endpoint = manifests.config_maps("vllm")["otel-npu"]["OTEL_EXPORTER_OTLP_ENDPOINT"]
    assert endpoint == f"http://agent.{namespace}.svc.cluster.local:4317"
    agent = manifests.one("collectors", "Service", "agent")
    assert 4317 in {port["port"] for port in agent["spec"]["ports"]}
    assert agent["spec"]["internalTrafficPolicy"] == "Local"
    config = yaml.safe_load(manifests.config_maps("collectors")["agent"]["config.yaml"])
    gateway = manifests.one("collectors", "Service", "gateway")
    assert gateway["spec"]["clusterIP"] == "None"
    [port] = [port["port"] for port in gateway["spec"]["ports"]]
    assert config["exporters"]["otlp_grpc"]["endpoint"] == f"dns:///gateway.{namespace}.svc.cluster.local:{port}"
    out = manifests.one("vllm", "NetworkPolicy", "vllm")["spec"]["egress"]
    assert namespace in [labels["kubernetes.io/metadata.name"] for labels in _matched(out)]
    into = manifests.one("collectors", "NetworkPolicy", "agent")["spec"]["ingress"]
    assert manifests.kustomization("vllm")["namespace"] in [
        labels["kubernetes.io/metadata.name"] for labels in _matched(into)
    ]


def _matched(rules: Any) -> list[dict[str, str]]:
    return [selector["matchLabels"] for selector in values(rules, "namespaceSelector")]


def _server() -> tuple[Object, Object, Object]:
    pod: Object = manifests.one("vllm", "Deployment", "vllm")["spec"]["template"]["spec"]
    [relay], [server] = pod["initContainers"], pod["containers"]
    return pod, relay, server


def test_the_relay_is_a_sidecar_that_the_server_meets() -> None:
    pod, relay, server = _server()
    assert relay["restartPolicy"] == "Always"
    assert relay["command"] == ["otel-npu", "relay", "--wait"]
    assert relay["image"] == server["image"]
    assert relay["envFrom"] == server["envFrom"]
    for container in (relay, server):
        # The pod's user is everybody's, or they would turn each other away.
        assert not {"runAsUser", "runAsGroup"} & set(container["securityContext"])
        assert not {settings.SESSION, "XDG_RUNTIME_DIR"} & {entry["name"] for entry in container.get("env", [])}
    shared = manifests.config_maps("vllm")["otel-npu"]
    [mount] = [mount for mount in relay["volumeMounts"] if mount["name"] == "relay"]
    assert mount in server["volumeMounts"]
    assert mount["mountPath"] == shared["XDG_RUNTIME_DIR"]
    [volume] = [volume for volume in pod["volumes"] if volume["name"] == "relay"]
    assert "emptyDir" in volume
    user = pod["securityContext"]["runAsUser"]
    path = f"{shared['XDG_RUNTIME_DIR']}/otel-npu-{user}/{shared[settings.SESSION]}.sock"
    assert relay["startupProbe"]["exec"]["command"] == ["test", "-S", path]


def test_the_server_traces_to_where_its_relay_does() -> None:
    _pod, _relay, server = _server()
    environment = {entry["name"]: entry.get("value", "") for entry in server["env"]}
    assert Settings.from_environment(environment).enabled
    assert "--otlp-traces-endpoint=$(OTEL_EXPORTER_OTLP_ENDPOINT)" in server["args"]
    asked = set(re.findall(r"\$\((\w+)\)", environment["OTEL_RESOURCE_ATTRIBUTES"]))
    names = [entry["name"] for entry in server["env"]]
    # Kubernetes fills in only what stands before.
    assert asked <= set(names[: names.index("OTEL_RESOURCE_ATTRIBUTES")])


def test_the_server_asks_for_as_many_npus_as_it_has_ranks() -> None:
    _pod, _relay, server = _server()
    resources = server["resources"]
    npus = resources["limits"]["huawei.com/Ascend910"]
    assert resources["requests"]["huawei.com/Ascend910"] == npus
    assert f"--tensor-parallel-size={npus}" in server["args"]


def test_the_image_has_the_version_of_vllm_ascend_that_it_is_named_after() -> None:
    [image] = manifests.kustomization("vllm")["images"]
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert f"FROM quay.io/ascend/vllm-ascend:{image['newTag']}\n" in dockerfile
    assert f"{image['newName']}:{image['newTag']}" in README
