"""Every command in the README and in deploy/README.md runs from a clean checkout, or is listed here with why not."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.helpers import REPOSITORY

if TYPE_CHECKING:
    from tests.helpers.receiver import Receiver

pytestmark = pytest.mark.slow

DOCUMENTS = ("README.md", "deploy/README.md", "docs/vllm.md", "docs/python.md", "docs/costs.md")
_COMMAND = r"(?:[A-Z_]+=\S+ )*(?:export|make|pip|python|otel-npu|vllm serve|docker|kubectl)\b"
_OTLP = "http://localhost:4317"

# What stands round the README's lines in `serve.py`, which is the reader's own.
_SERVE = """
class Logits(list): ...
traceparent = "00-" + "1" * 32 + "-" + "2" * 16 + "-01"
model = sample = Logits
tokens = [1, 2, 3]
"""

ELSEWHERE = {
    "make test": "it runs this test",
    "make test-quick": "it runs what `make test` does",
    "pip install .": "tests/test_package.py, into an environment of its own",
    "export OTEL_NPU_ENABLED=1 OTEL_SERVICE_NAME=vllm; vllm serve MODEL --otlp-traces-endpoint http://collector:4317": (
        "tests/vllm/test_examples.py, by the script that says it"
    ),
    "vllm serve MODEL --otlp-traces-endpoint http://localhost:4317": "the same",
    "otel-npu doctor": "tests/cli/test_doctor.py",
    "otel-npu top": "tests/cli/test_top.py, beside a program",
    "otel-npu record -o slow.json": "tests/cli/test_record.py, beside a program",
    "otel-npu report slow.json --compare before.json": "tests/cli/test_report.py",
    "otel-npu off": "tests/cli/test_switch.py, beside a program",
    "otel-npu demo --forever": "tests/cli/test_demo.py",
    "otel-npu relay": "tests/deploy/test_relay.py",
    "make bench": "its command is run here with fewer rounds",
    "make check": "`.ci/run` runs it",
    "export OTEL_NPU_SESSION=llm XDG_RUNTIME_DIR=/run/otel-npu; otel-npu relay --wait": (
        "tests/deploy/test_relay.py, in a folder of its own"
    ),
}
NO_ENGINE = ("docker ", "kubectl ")  # there is no engine for containers on the test machine


def commands(document: str) -> list[str]:
    """The commands of its indented blocks, each with the exports before it, and those within its sentences."""
    text = (REPOSITORY / document).read_text()
    found: list[str] = []
    exports: list[str] = []
    for line in text.splitlines():
        match = re.fullmatch(rf" {{4,7}}({_COMMAND}.*?)(?:\s+#.*)?", line)
        if match is None:
            exports = exports if line.startswith("    ") else []
        elif match[1].startswith("export "):
            exports.append(match[1])
        else:
            found.append("; ".join([*exports, match[1]]))
    return found + re.findall(r"`((?:make|python -m|otel-npu|vllm serve) [^`]+)`", text)


def runs_here(command: str) -> bool:
    return command not in ELSEWHERE and not command.startswith(NO_ENGINE)


RUN = sorted({command for document in DOCUMENTS for command in commands(document) if runs_here(command)})


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What git has, and the reader's `serve.py`, in a folder of its own."""
    folder = tmp_path_factory.mktemp("checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        source, target = REPOSITORY / name, folder / name
        if source.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
    (block,) = re.findall(r"^```python\n(.*?)^```$", (REPOSITORY / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    (folder / "serve.py").write_text(_SERVE + block)
    return folder


@pytest.mark.skipif(not (REPOSITORY / ".git").exists(), reason="this is no checkout of git")
@pytest.mark.parametrize("command", RUN)
def test_a_documented_command_runs(checkout: Path, receiver: Receiver, command: str) -> None:
    given = command.replace(_OTLP, f"http://127.0.0.1:{receiver.grpc_port}")
    if "stage_cost" in given:
        given += " --rounds 20"
    if "holding_cost" in given:
        given += " --steps 100"
    if "vllm_cost" in given:
        if importlib.util.find_spec("vllm") is None:
            pytest.skip("vLLM is not installed")
        given += " --pairs 2 --device-ms 0"
    environment = {name: value for name, value in os.environ.items() if name != "OTEL_NPU_SESSION"}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-c", given], cwd=checkout, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, f"{given}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    if _OTLP in command:
        receiver.wait_for(3)
    if "serve.py" in command:
        assert {span.name for span in receiver.spans} == {"worker_step", "forward", "sample"}
