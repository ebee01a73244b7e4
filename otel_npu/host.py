"""The NPUs of this host, from files that anybody may read: no torch, no `npu-smi`, no device is opened."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_ROOT: Final = Path("/")
_HUAWEI: Final = "0x19e5"
# By PCI device id, as the Ascend driver's own tools tell them apart.
_MODELS: Final = {
    "0xd100": "Ascend310",
    "0xd500": "Ascend310P",
    "0xd801": "Ascend910",
    "0xd802": "Ascend910B",
    "0xd803": "Ascend910_93",
}
_TOOLKITS: Final = ("ascend-toolkit/latest", "cann", "latest", "nnae/latest", "nnrt/latest")
_TOOLKIT_VARIABLES: Final = ("ASCEND_TOOLKIT_HOME", "ASCEND_HOME_PATH")
# `version=8.2.RC1` of an installer, or `toolkit_running_version=[7.6.0.1.220:8.0.0]` of version.cfg.
_CANN_VERSION: Final = re.compile(
    r"^(?:version=|(?:toolkit|runtime)_running_version=\[(?:[^:\]\n]*:)?)([\w.+-]{1,64})", re.MULTILINE
)
_DRIVER_VERSION: Final = re.compile(r"^Version=([\w.+-]{1,64})", re.MULTILINE)
_DRIVER_FOLDER: Final = re.compile(r"^Driver_Install_Path_Param=(/\S*)", re.MULTILINE)
_MAX_CHARACTERS: Final = 1 << 16


def npus(root: Path = _ROOT) -> list[str]:
    """The device nodes of the NPUs that this host, or container, has: `davinci0` and so on."""
    numbers = sorted(
        int(node.name.removeprefix("davinci"))
        for node in _entries(root / "dev")
        if re.fullmatch(r"davinci\d+", node.name)
    )
    return [f"davinci{number}" for number in numbers]


def npu_model(root: Path = _ROOT) -> str:
    """The model of the NPUs, such as Ascend910B; empty where it is unknown, or where there are several."""
    models = {
        _MODELS.get(_read(device / "device").strip(), "")
        for device in _entries(root / "sys/bus/pci/devices")
        if _read(device / "vendor").strip() == _HUAWEI
    } - {""}  # Huawei's other cards
    return models.pop() if len(models) == 1 else ""


def driver_version(root: Path = _ROOT) -> str:
    """The version of the NPU's driver; empty where it is not to be read."""
    places = [*_DRIVER_FOLDER.findall(_read(root / "etc/ascend_install.info")), "/usr/local/Ascend"]
    return _first(_DRIVER_VERSION, (_under(root, place) / "driver/version.info" for place in places))


def cann_version(root: Path = _ROOT, environment: Mapping[str, str] = os.environ) -> str:
    """The version of CANN, the one that the environment names before the usual ones; empty if there is none."""
    named = [Path(environment[name]) for name in _TOOLKIT_VARIABLES if environment.get(name)]
    usual = [root / "usr/local/Ascend" / toolkit for toolkit in _TOOLKITS]
    platform_folder = f"{platform.machine()}-linux"
    files = (
        folder / name
        for toolkit in (*named, *usual)
        for folder in (toolkit / platform_folder, toolkit)
        for name in ("ascend_toolkit_install.info", "ascend_nnae_install.info", "version.cfg")
    )
    return _first(_CANN_VERSION, files)


def _first(pattern: re.Pattern[str], files: Iterable[Path]) -> str:
    for file in files:
        found = pattern.search(_read(file))
        if found:
            return str(found[1])
    return ""


def _under(root: Path, place: str) -> Path:
    return root / place.lstrip("/")


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _read(file: Path) -> str:
    try:
        with file.open(encoding="utf-8", errors="replace") as stream:
            return stream.read(_MAX_CHARACTERS)
    except OSError:
        return ""
