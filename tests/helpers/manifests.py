"""The files under `deploy/kubernetes`, as kustomize reads them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import yaml

from tests.helpers import REPOSITORY

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ROOT: Final = REPOSITORY / "deploy/kubernetes"
FOLDERS: Final = ("collectors", "vllm")

Object = dict[str, Any]


def kustomization(folder: str) -> Object:
    """The kustomization of a folder."""
    loaded: Object = yaml.safe_load((ROOT / folder / "kustomization.yaml").read_text())
    return loaded


def objects(folder: str) -> list[Object]:
    """What the folder's resources hold."""
    return [
        document
        for resource in kustomization(folder)["resources"]
        for document in yaml.safe_load_all((ROOT / folder / resource).read_text())
    ]


def one(folder: str, kind: str, name: str) -> Object:
    """The object of this kind and name."""
    [found] = [item for item in objects(folder) if item["kind"] == kind and item["metadata"]["name"] == name]
    return found


def workloads(folder: str) -> list[Object]:
    """What has pods."""
    return [item for item in objects(folder) if "template" in item.get("spec", {})]


def containers(workload: Object) -> list[Object]:
    """All containers of its pods."""
    pod = workload["spec"]["template"]["spec"]
    return [*pod.get("initContainers", []), *pod["containers"]]


def config_maps(folder: str) -> dict[str, dict[str, str]]:
    """What kustomize makes of the folder's generators."""
    made = {}
    for generator in kustomization(folder).get("configMapGenerator", []):
        data = {}
        for entry in generator.get("files", []):
            key, _, path = entry.rpartition("=")
            data[key or path] = (ROOT / folder / path).read_text()
        for path in generator.get("envs", []):
            data.update(environment(ROOT / folder / path))
        made[generator["name"]] = data
    return made


def environment(path: Path) -> dict[str, str]:
    """A file of `NAME=value` lines."""
    return dict(line.split("=", 1) for line in path.read_text().splitlines() if line and not line.startswith("#"))


def values(item: Any, key: str) -> Iterator[Any]:
    """Every value that stands under this key, however deep."""
    if isinstance(item, dict):
        for name, value in item.items():
            if name == key:
                yield value
            yield from values(value, key)
    elif isinstance(item, list):
        for value in item:
            yield from values(value, key)
