"""The command line, as a person or a container runs it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import otel_npu
from tests.conftest import program
from tests.helpers.command_line import line_of, otel_npu_command
from tests.helpers.traced import PATIENCE_SECONDS, eventually

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.helpers.receiver import Receiver


class TestRelay:
    def test_it_serves_a_program_of_its_session_and_ends_on_sigterm(
        self, start: Callable[..., subprocess.Popen[str]], receiver: Receiver, tmp_path: Path
    ) -> None:
        session = {"OTEL_NPU_SESSION": "shared"}
        relay = start("relay", environment={**receiver.http_environment, **session})
        assert line_of(relay).startswith("relay of session 'shared', process ")
        folder = Path(os.environ["XDG_RUNTIME_DIR"], f"otel-npu-{os.getuid()}")
        eventually((folder / "shared.sock").exists, "the relay listens")
        source = """
            import otel_npu

            for _ in range(3):
                with otel_npu.step("decode"), otel_npu.stage("forward"):
                    pass
        """
        environment = {
            **os.environ,
            **session,
            "OTEL_NPU_ENABLED": "1",
            "OTEL_NPU_DEVICE": "cpu",
            "OTEL_NPU_STEPS_PER_SECOND": "all",
            "OTEL_SERVICE_NAME": "a-client",
            # Were the program to start a relay of its own, its spans would go nowhere.
            "OTEL_TRACES_EXPORTER": "none",
        }
        subprocess.run(program(tmp_path, source), env=environment, check=True, timeout=PATIENCE_SECONDS)
        spans = receiver.wait_for(3, "worker_step")
        assert {span.resource["service.name"] for span in spans} == {"a-client"}
        assert relay.poll() is None  # although its only client has gone
        relay.send_signal(signal.SIGTERM)
        assert relay.wait(PATIENCE_SECONDS) == 0
        assert not (folder / "shared.sock").exists()

    def test_a_second_relay_does_not_take_the_session_from_the_first(
        self, start: Callable[..., subprocess.Popen[str]]
    ) -> None:
        session = {"OTEL_NPU_SESSION": "shared", "OTEL_TRACES_EXPORTER": "none"}
        first = start("relay", environment=session)
        path = Path(os.environ["XDG_RUNTIME_DIR"], f"otel-npu-{os.getuid()}", "shared.sock")
        eventually(path.exists, "the relay listens")
        second = otel_npu_command("relay", environment=session)
        assert second.returncode == 1
        assert "already" in second.stderr
        assert first.poll() is None
        assert path.exists()

    def test_without_a_session_it_says_what_is_missing(self) -> None:
        done = otel_npu_command("relay")
        assert done.returncode == 2
        assert done.stderr.startswith("OTEL_NPU_SESSION is not set")


def test_version_is_printed() -> None:
    assert otel_npu_command("--version").stdout == f"otel-npu {otel_npu.__version__}\n"


def test_it_runs_as_a_module_too() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "otel_npu", "--version"],
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=True,
    )
    assert done.stdout == f"otel-npu {otel_npu.__version__}\n"


def test_a_shell_completes_its_commands() -> None:
    asked = {"_OTEL_NPU_COMPLETE": "complete_bash", "COMP_WORDS": "otel-npu d", "COMP_CWORD": "1"}
    done = otel_npu_command(environment=asked)
    assert {"demo", "doctor"} <= set(done.stdout.split())
    assert "--install-completion" in otel_npu_command("--help").stdout


def test_help_names_the_commands_and_loads_neither_the_sdk_nor_the_demo(
    run_program: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    done = run_program("""
        import sys

        sys.argv = ["otel-npu", "--help"]
        from otel_npu.cli import main

        try:
            main()
        except SystemExit as end:
            assert end.code == 0
        assert not {"opentelemetry.sdk", "otel_npu.cli.demo.command", "torch"} & set(sys.modules)
    """)
    assert "demo" in done.stdout
    assert "relay" in done.stdout
