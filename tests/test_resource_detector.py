"""The SDK's resource says which NPUs the host has, if it is asked to; where there are none it says nothing."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING

import pytest

from otel_npu import host, semconv
from otel_npu.resource_detector import NpuResourceDetector

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable
    from pathlib import Path

VERSION_CFG = """\
# version: 1.0
runtime_running_version=[7.6.0.1.220:8.0.0]
compiler_running_version=[7.6.0.1.220:8.0.0]
toolkit_running_version=[7.6.0.1.220:8.0.0]
runtime_upgrade_version=[7.6.0.1.220:8.0.1]
"""
INSTALL_INFO = "package_name=Ascend-cann-toolkit\nversion=8.2.RC1\ninnerversion=V100R001C22\narch=aarch64\n"


def write(root: Path, path: str, text: str = "") -> None:
    file = root / path.lstrip("/")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def pci(root: Path, slot: str, vendor: str, device: str) -> None:
    write(root, f"/sys/bus/pci/devices/{slot}/vendor", f"{vendor}\n")
    write(root, f"/sys/bus/pci/devices/{slot}/device", f"{device}\n")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host's files; the detector looks there."""
    monkeypatch.delenv("ASCEND_TOOLKIT_HOME", raising=False)
    monkeypatch.delenv("ASCEND_HOME_PATH", raising=False)
    for function in (host.npus, host.npu_model, host.driver_version, host.cann_version):
        monkeypatch.setattr(function, "__defaults__", (tmp_path, *(function.__defaults__ or ())[1:]))
    return tmp_path


def test_the_npus_of_a_host(root: Path) -> None:
    for node in ("davinci10", "davinci0", "davinci2", "davinci_manager", "hisi_hdc"):
        write(root, f"/dev/{node}")
    pci(root, "0000:01:00.0", "0x19e5", "0xd802")
    pci(root, "0000:01:00.1", "0x19e5", "0xd802")
    pci(root, "0000:02:00.0", "0x19e5", "0x0222")  # a network card of the same maker
    pci(root, "0000:03:00.0", "0x8086", "0xd500")
    write(root, "/usr/local/Ascend/driver/version.info", "Version=24.1.rc1\nascendhal_version=7.35.19\n")
    write(
        root,
        f"/usr/local/Ascend/ascend-toolkit/latest/{platform.machine()}-linux/ascend_toolkit_install.info",
        INSTALL_INFO,
    )
    assert dict(NpuResourceDetector().detect().attributes) == {
        "hw.id": "davinci0,davinci2,davinci10",
        "hw.type": "npu",
        "hw.name": "Ascend910B",
        "hw.driver_version": "24.1.rc1",
        "npu.cann.version": "8.2.RC1",
    }


def test_what_cannot_be_read_is_left_out(root: Path) -> None:
    write(root, "/dev/davinci0")
    assert dict(NpuResourceDetector().detect().attributes) == {"hw.id": "davinci0", "hw.type": "npu"}


def test_chips_of_two_models_have_no_common_name(root: Path) -> None:
    pci(root, "0000:01:00.0", "0x19e5", "0xd802")
    pci(root, "0000:02:00.0", "0x19e5", "0xd500")
    assert host.npu_model() == ""


def test_a_driver_that_is_installed_elsewhere(root: Path) -> None:
    write(root, "/etc/ascend_install.info", "UserName=HwHiAiUser\nDriver_Install_Path_Param=/opt/Ascend\n")
    write(root, "/opt/Ascend/driver/version.info", "Version=25.0.rc1\n")
    assert host.driver_version() == "25.0.rc1"


def test_the_cann_that_the_environment_names_comes_first(root: Path) -> None:
    write(root, "/usr/local/Ascend/cann/version.cfg", VERSION_CFG)
    assert host.cann_version(root, {}) == "8.0.0"
    write(root, "/home/me/cann/ascend_toolkit_install.info", INSTALL_INFO)
    assert host.cann_version(root, {"ASCEND_HOME_PATH": str(root / "home/me/cann")}) == "8.2.RC1"


def test_a_file_that_is_not_text_is_no_version(root: Path) -> None:
    (root / "usr/local/Ascend/driver").mkdir(parents=True)
    (root / "usr/local/Ascend/driver/version.info").write_bytes(b"\xff\xfe\x00Version=\n")
    assert host.driver_version() == ""


def test_a_fault_is_no_fault_of_the_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> list[str]:
        raise RuntimeError

    monkeypatch.setattr(host, "npus", fail)
    assert dict(NpuResourceDetector().detect().attributes) == {}


def test_every_name_is_a_term(root: Path) -> None:
    terms = {term.name for term in semconv.ATTRIBUTES}
    assert {semconv.HW_ID, semconv.HW_TYPE, semconv.HW_NAME, semconv.HW_DRIVER_VERSION, semconv.CANN_VERSION} <= terms


def test_the_sdk_finds_it_by_its_name_and_it_is_silent_without_an_npu(
    run_program: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    done = run_program(
        """
        import sys
        from opentelemetry.sdk.resources import Resource
        attributes = Resource.create().attributes
        assert "otel_npu.resource_detector" in sys.modules
        assert "torch" not in sys.modules
        assert not any(name.startswith(("hw.", "npu.")) for name in attributes), attributes
        """,
        {"OTEL_EXPERIMENTAL_RESOURCE_DETECTORS": "npu"},
    )
    assert done.stdout == done.stderr == ""
