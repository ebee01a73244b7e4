"""`otel-npu doctor` names what is wrong and its cure: faults of the machine, of vLLM and of the environment."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import pytest

from otel_npu import hooks
from otel_npu.cli.doctor import accelerator, apart, engine, settings, sources
from otel_npu.cli.doctor.apart import Area
from otel_npu.cli.doctor.findings import Finding, Status
from otel_npu.hooks import Hook
from otel_npu.secrets import masked
from otel_npu.vllm.plugin import HOOKS
from tests.helpers.ascend.build import BuildError, build
from tests.helpers.doctored import (
    QUICK,
    assert_red,
    doctor,
    environment_without,
    run_doctor,
    targets_of,
    write_modules,
)
from tests.helpers.traced import processes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.helpers.receiver import Receiver

VLLM_HOOKS = [hook for hook in HOOKS if hook.package == "vllm" and hooks.in_range(hook, "0.32.0")]
NOT_NEEDED = "not_applicable"
DYNAMO = {"torch._dynamo": "def disable(): ...\n"}  # as every torch has


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Python without torch, torch_npu and vLLM."""
    return environment_without(tmp_path_factory.mktemp("bare") / "venv", "torch", "torch_npu", "vllm", "vllm_ascend")


@pytest.fixture
def libraries() -> Path:
    """The simulated Ascend runtime."""
    try:
        return build()
    except BuildError as error:
        pytest.skip(str(error))


@pytest.fixture
def stub_vllm(tmp_path: Path) -> Callable[..., str]:
    """A vLLM that is there in source, with what the hooks need, after some words of it are replaced."""

    def write(**replaced: str) -> str:
        modules = targets_of(VLLM_HOOKS, "0.32.0")
        for old, new in replaced.items():
            changed = {name: source.replace(f"def {old}(", f"def {new}(") for name, source in modules.items()}
            assert changed != modules
            modules = changed
        return str(write_modules(tmp_path / "packages", modules))

    return write


@pytest.mark.slow
class TestTheDevice:
    def test_without_torch(self, bare_python: str) -> None:
        report = doctor({"OTEL_TRACES_EXPORTER": "none"}, python=bare_python)
        assert report.code == 1
        assert_red(report["torch"], "not installed", "pip install torch")
        assert all(report[check]["status"] == "warning" for check in accelerator.CHECKS[1:])

    @pytest.mark.skipif(not sources.installed("torch_npu"), reason="torch_npu is not installed")
    def test_torch_npu_without_cann(self) -> None:
        report = doctor({"OTEL_TRACES_EXPORTER": "none", "LD_LIBRARY_PATH": ""})
        assert report["torch"]["status"] == "ok"
        assert report["torch_npu"]["status"] == "ok"
        assert_red(report["CANN library"], "can't be found", "set_env.sh")

    @pytest.mark.slow
    def test_a_library_without_the_timestamp_call(self, libraries: Path, tmp_path: Path) -> None:
        older = tmp_path / "lib"
        shutil.copytree(libraries, older)
        library = older / "libascendcl.so"
        library.write_bytes(library.read_bytes().replace(b"aclrtEventGetTimestamp", b"aclrtEventNoTimestamps"))
        report = doctor({"OTEL_TRACES_EXPORTER": "none", "LD_LIBRARY_PATH": str(older)})
        assert_red(report["CANN library"], "has no aclrtEventGetTimestamp", "install the CANN that torch_npu")
        assert str(library) in report["CANN library"]["found"]
        assert report["timing events"]["status"] == "warning"

    @pytest.mark.slow
    def test_a_device_that_works(self, libraries: Path) -> None:
        report = doctor({"OTEL_TRACES_EXPORTER": "none", "LD_LIBRARY_PATH": str(libraries)})
        assert {check: report[check]["status"] for check in accelerator.CHECKS} == dict.fromkeys(
            accelerator.CHECKS, "ok"
        )
        assert "2 x Ascend910B3" in report["devices"]["found"]
        assert "by torch and by raw handle" in report["timing events"]["found"]
        assert "+-" in report["device clock"]["found"]

    def test_no_npu_and_no_torch_npu_is_no_fault(self, bare_python: str, tmp_path: Path) -> None:
        packages = write_modules(tmp_path, {"torch": "__version__ = '2.10.0+cpu'\n", **DYNAMO})
        environment = {"OTEL_TRACES_EXPORTER": "none", "PYTHONPATH": str(packages)}
        report = doctor(environment, python=bare_python)
        assert report.code == 0
        assert report["torch"]["found"] == "2.10.0+cpu"
        assert {report[check]["status"] for check in accelerator.CHECKS[1:]} == {NOT_NEEDED}
        asked = doctor({**environment, "OTEL_NPU_DEVICE": "npu"}, python=bare_python)
        assert_red(asked["torch_npu"], "OTEL_NPU_DEVICE=npu asks for it", "pip install torch-npu==2.10.*")
        other = doctor({**environment, "OTEL_NPU_DEVICE": "cuda"}, python=bare_python)
        assert_red(other["devices"], "torch has no 'cuda' here", "OTEL_NPU_DEVICE=auto")

    def test_torch_and_torch_npu_of_different_versions(self, bare_python: str, tmp_path: Path) -> None:
        stubs = {**DYNAMO, "torch": "__version__ = '2.10.0'\n", "torch_npu": "__version__ = '2.5.1.post1'\n"}
        report = doctor({**QUICK, "OTEL_NPU_DEVICE": "auto", "PYTHONPATH": str(write_modules(tmp_path, stubs))})
        assert_red(report["torch_npu"], "2.5.1.post1 with torch 2.10.0", "pip install torch-npu==2.10.*")

    def test_a_crash_is_told_and_stops_nothing_else(self, tmp_path: Path) -> None:
        crash = "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n"
        packages = write_modules(tmp_path, {"torch": crash, **DYNAMO})
        report = doctor({"OTEL_TRACES_EXPORTER": "none", "PYTHONPATH": str(packages)})
        assert_red(report["torch"], "SIGSEGV", "")
        assert report["torch_npu"]["status"] == "warning"
        assert report["relay"]["status"] == "ok"

    def test_where_the_host_is_the_device_torch_is_not_asked(self) -> None:
        report = doctor(QUICK)
        assert {report[check]["status"] for check in accelerator.CHECKS} == {NOT_NEEDED}


class TestTimeLimits:
    def test_what_does_not_answer_is_ended_and_told(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        hang = "import os, time\nopen(os.environ['PID_FILE'], 'w').write(str(os.getpid()))\ntime.sleep(600)\n"
        monkeypatch.setenv("PYTHONPATH", str(write_modules(tmp_path, {"torch": hang})))
        monkeypatch.setenv("PID_FILE", str(tmp_path / "pid"))
        real = apart.AREAS["accelerator"]
        monkeypatch.setitem(apart.AREAS, "accelerator", Area(real.checks, real.run, seconds=3.0, slow=real.slow))
        first, *rest = apart.run("accelerator")
        assert (first.check, first.status) == ("torch", Status.WARNING)  # a cold disk is no fault
        assert "no answer within 3 s" in first.found
        assert [finding.check for finding in rest] == list(accelerator.CHECKS[1:])
        pid = int((tmp_path / "pid").read_text() or 0)
        assert pid not in processes()

    def test_a_device_that_does_not_answer_is_a_fault(self) -> None:
        area = apart.AREAS["accelerator"]
        said = [Finding(check, Status.OK, "") for check in accelerator.CHECKS[:4]]
        hung, unreached = apart._unsaid(area, said, None, "")
        assert (hung.check, hung.status) == ("timing events", Status.FAILED)
        assert (unreached.check, unreached.status) == ("device clock", Status.WARNING)

    def test_all_limits_fit_into_fifteen_seconds(self) -> None:
        assert max(area.seconds for area in apart.AREAS.values()) < 14


class TestVllm:
    def test_all_is_well(self, stub_vllm: Callable[..., str]) -> None:
        report = doctor({**QUICK, "PYTHONPATH": stub_vllm()})
        assert report["vLLM"] == {"check": "vLLM", "status": "ok", "found": "0.32.0", "cure": ""}
        assert report["vllm-ascend"]["status"] == NOT_NEEDED
        assert report["vLLM hooks"]["found"] == f"all {len(VLLM_HOOKS)} targets found"
        assert report["vLLM plugin"]["status"] == "ok"

    @pytest.mark.skipif(not sources.installed("vllm"), reason="vLLM is not installed")
    @pytest.mark.slow
    def test_the_vllm_that_is_installed_has_every_target(self) -> None:
        report = doctor(QUICK)
        assert report["vLLM hooks"]["status"] == "ok"
        assert report["vLLM"]["found"] == sources.version("vllm")

    @pytest.mark.slow
    def test_a_hook_target_that_was_renamed(self, stub_vllm: Callable[..., str]) -> None:
        report = doctor({**QUICK, "PYTHONPATH": stub_vllm(do_tracing="do_trace")})
        assert report.code == 1
        assert_red(report["vLLM hooks"], "OutputProcessor.do_tracing in vllm.v1.engine.output_processor", "otel-npu")
        assert f"1 of {len(VLLM_HOOKS)} targets" in report["vLLM hooks"]["found"]

    @pytest.mark.parametrize("plugins", ["other", "", "other, otel_npu"])
    def test_a_plugin_that_is_excluded(self, monkeypatch: pytest.MonkeyPatch, plugins: str) -> None:
        monkeypatch.setattr(sources, "installed", lambda _: True)
        monkeypatch.setenv("VLLM_PLUGINS", plugins)
        [finding] = engine.plugin()
        assert finding.status is Status.FAILED
        assert "excluded: VLLM_PLUGINS=" in finding.found
        assert "otel_npu" in finding.cure

    @pytest.mark.slow
    def test_a_plugin_that_is_named_and_what_is_not_supported(self, stub_vllm: Callable[..., str]) -> None:
        report = doctor({**QUICK, "PYTHONPATH": stub_vllm(), "VLLM_PLUGINS": "other,otel_npu"})
        assert report["vLLM plugin"]["status"] == "ok"
        found = report["not traced"]["found"]
        assert all(words in found for words in ("VLLM_USE_RUST_FRONTEND", "stream", "traces of their steps", "Ray"))

    @pytest.mark.slow
    def test_without_vllm_there_is_nothing_to_check(self, bare_python: str) -> None:
        report = doctor(QUICK, python=bare_python)
        names = ("vLLM", "vllm-ascend", "vLLM hooks", "vLLM plugin", "not traced")
        assert {report[check]["status"] for check in names} == {NOT_NEEDED}


class TestSources:
    MODULES: ClassVar = {
        "found_a": "__version__ = '1.2'\n",
        "found_a.owner": (
            "from found_a.base import Base as Renamed\nfrom .other import function\n"
            "try:\n    import nothing\nexcept ImportError:\n    nothing = None\n"
            "class Owner(Renamed):\n    def own(self, one, *, two): ...\n"
            "class Strange(nothing.Base): ...\n"
        ),
        "found_a.base": "class Base:\n    def inherited(self, one): ...\n    made = print\n",
        "found_a.other": "def function(one): ...\n",
    }

    @pytest.fixture(autouse=True)
    def packages(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.syspath_prepend(str(write_modules(tmp_path, self.MODULES)))
        sources._folders.cache_clear()
        sources._parsed.cache_clear()

    def complaint(self, target: str, *parameters: str, module: str = "found_a.owner") -> str | None:
        return sources.complaint(Hook("found_a", module, target, lambda function: function, parameters))

    def test_what_is_there_is_found(self) -> None:
        assert self.complaint("Owner.own", "one", "two") is None
        assert self.complaint("Owner.inherited", "one") is None
        assert self.complaint("function", "one") is None
        assert sources.version("found_a") == "1.2"

    def test_what_is_not_there_is_missed(self) -> None:
        assert self.complaint("Owner.gone") == "is not there"
        assert self.complaint("Gone.own") == "is not there"
        assert self.complaint("Owner.own", "one", "three") == "does not take three"
        assert self.complaint("own", module="found_a.gone") == "is not there: no such module"

    @pytest.mark.parametrize("target", ["Strange.own", "Owner.made"])
    def test_what_the_source_does_not_tell_is_said_to_be_so(self, target: str) -> None:
        with pytest.raises(sources.NoSourceError):
            self.complaint(target)


class TestTheEnvironment:
    def test_a_bad_variable(self) -> None:
        report = doctor({**QUICK, "OTEL_NPU_HANG_SECONDS": "soon", "OTEL_NPU_STEPS_PER_SECOND": "-1"})
        assert report.code == 1
        hang, steps = sorted(report.all_of("environment"), key=lambda finding: finding["found"])
        assert_red(hang, "OTEL_NPU_HANG_SECONDS='soon'", "takes a number of seconds above 0, or 'never'")
        assert_red(steps, "OTEL_NPU_STEPS_PER_SECOND='-1'", "takes a number of steps a second")

    @pytest.mark.slow
    def test_a_variable_that_is_misspelled(self) -> None:
        report = doctor({**QUICK, "OTEL_NPU_STEP_PER_SECOND": "3"})
        assert report.code == 0
        [finding] = report.all_of("environment")
        assert finding["status"] == "warning"
        assert finding["cure"] == "is OTEL_NPU_STEPS_PER_SECOND meant?"

    @pytest.mark.parametrize(
        ("variable", "bad", "good"),
        [
            ("OTEL_NPU_SESSION", "a/b", "a-b"),
            ("OTEL_TRACES_SAMPLER", "sometimes", "parentbased_traceidratio"),
            ("OTEL_TRACES_SAMPLER_ARG", "2", "0.5"),
            ("OTEL_TRACES_EXPORTER", "jaeger", "console,otlp"),
            ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json", "http/protobuf"),
            ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "GRPC", "grpc"),
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "ftp://host", "https://host:4317"),
            ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://", "host:4317"),
            ("OTEL_EXPORTER_OTLP_HEADERS", "Bearer token", "authorization=Bearer%20token,x-scope=a=b"),
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "10s", "2.5"),
            ("OTEL_EXPORTER_OTLP_COMPRESSION", "zstd", "gzip"),
            ("OTEL_EXPORTER_OTLP_INSECURE", "1", "true"),
            ("OTEL_EXPORTER_OTLP_CERTIFICATE", "/no/such/file", __file__),
            ("OTEL_BSP_MAX_QUEUE_SIZE", "0", "512"),
            ("OTEL_SPAN_LINK_COUNT_LIMIT", "-1", "0"),
        ],
    )
    def test_standard_variables_are_checked_as_they_are_read(
        self, monkeypatch: pytest.MonkeyPatch, variable: str, bad: str, good: str
    ) -> None:
        monkeypatch.setenv(variable, bad)
        [finding] = settings.environment()
        assert finding.status is Status.FAILED
        assert variable in finding.found
        assert finding.cure.startswith("takes ")
        monkeypatch.setenv(variable, good)
        [finding] = settings.environment()
        assert finding.status is Status.OK, finding

    def test_what_the_sdk_ignores_is_a_hint(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("OTEL_SDK_DISABLED", "1")
        [finding] = settings.environment()
        assert finding.status is Status.WARNING

    @pytest.mark.parametrize(
        ("environment", "status"),
        [
            ({}, Status.WARNING),
            ({"OTEL_NPU_ENABLED": "1"}, Status.OK),
            ({"VLLM_ASCEND_MODEL_EXECUTE_TIME_OBSERVE": "1"}, Status.OK),
            ({"OTEL_NPU_ENABLED": "1", "OTEL_SDK_DISABLED": "true"}, Status.WARNING),
        ],
    )
    def test_it_says_whether_tracing_is_on(
        self, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], status: Status
    ) -> None:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        [finding] = settings.tracing()
        assert finding.status is status


@pytest.mark.slow
class TestTheRelay:
    def test_a_folder_that_is_not_private(self, tmp_path: Path) -> None:
        folder = tmp_path / f"otel-npu-{os.getuid()}"
        folder.mkdir()
        folder.chmod(0o755)
        report = doctor({**QUICK, "XDG_RUNTIME_DIR": str(tmp_path)})
        assert report.code == 1
        assert_red(report["socket folder"], "mode 0700, and is not", f"chmod 700 {folder}")
        folder.chmod(0o700)
        assert doctor({**QUICK, "XDG_RUNTIME_DIR": str(tmp_path)})["socket folder"]["status"] == "ok"

    def test_a_path_longer_than_a_sockets_name_is_no_trouble(self, tmp_path: Path) -> None:
        deep = tmp_path / ("d" * 100)
        deep.mkdir()
        report = doctor({**QUICK, "XDG_RUNTIME_DIR": str(deep)})
        assert report["relay"]["status"] == "ok"

    def test_a_relay_that_ends_as_soon_as_it_starts(self, tmp_path: Path) -> None:
        source = "import sys\nif 'otel_npu.relay' in sys.orig_argv:\n    sys.exit('no memory for you')\n"
        packages = write_modules(tmp_path, {"sitecustomize": source})
        report = doctor({**QUICK, "PYTHONPATH": str(packages)})
        assert report.code == 1
        assert_red(report["relay"], "no memory for you", "-m otel_npu.relay")

    def test_a_relay_on_a_thread_needs_no_process(self) -> None:
        report = doctor({**QUICK, "OTEL_NPU_EXPORT": "inprocess"})
        assert {report[check]["status"] for check in ("socket folder", "relay")} == {NOT_NEEDED}


@pytest.mark.slow
class TestARunningServer:
    @pytest.fixture
    def server(self, receiver: Receiver) -> Iterator[subprocess.Popen[bytes]]:
        """What looks like the relay of a server that was told its endpoint by a flag."""
        told = {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"http://me:secret@127.0.0.1:{receiver.grpc_port}"}
        command = [sys.executable, "-c", "import time; time.sleep(120)", "-m", "otel_npu.relay", "--life", "3"]
        process = subprocess.Popen(command, env={**os.environ, **told})
        yield process
        process.kill()
        process.wait()

    def test_it_is_told_where_that_ones_relay_sends_and_that_is_tried(
        self, server: subprocess.Popen[bytes], receiver: Receiver
    ) -> None:
        report = doctor({"OTEL_NPU_DEVICE": "cpu"})
        where = f"http://***@127.0.0.1:{receiver.grpc_port} (grpc)"
        assert report["running relay"]["found"] == f"process {server.pid} sends to {where}"
        assert report["endpoint"]["status"] == "ok", report["endpoint"]
        assert report["endpoint"]["found"].endswith(f", as process {server.pid} does")
        assert "secret" not in report.output
        assert receiver.named("doctor_test")

    def test_an_endpoint_in_the_environment_counts_more(self, server: subprocess.Popen[bytes]) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            given = f"http://127.0.0.1:{taken.getsockname()[1]}"
            report = doctor({"OTEL_NPU_DEVICE": "cpu", "OTEL_EXPORTER_OTLP_ENDPOINT": given})
        assert report["endpoint"]["status"] == "failed"

    def test_without_one_there_is_no_such_row(self) -> None:
        assert not doctor(QUICK).all_of("running relay")


class TestTheCommand:
    @pytest.mark.slow
    def test_checks_that_say_the_same_are_one_row(self) -> None:
        done = run_doctor(environment=QUICK)
        [row] = [line for line in done.stdout.splitlines() if "not used: OTEL_NPU_DEVICE=cpu" in line]
        assert row.endswith("(torch_npu, CANN library, devices, timing events, device clock too)")

    @pytest.mark.slow
    def test_a_service_without_a_name_is_worth_a_look(self) -> None:
        [nameless] = doctor(QUICK).all_of("service name")
        assert nameless["status"] == "warning"
        assert "set OTEL_SERVICE_NAME" in nameless["cure"]
        for named in ({"OTEL_SERVICE_NAME": "vllm"}, {"OTEL_RESOURCE_ATTRIBUTES": "service.name=vllm"}):
            assert doctor({**QUICK, **named})["service name"] == {
                "check": "service name",
                "status": "ok",
                "found": "vllm",
                "cure": "",
            }

    @pytest.mark.slow
    def test_nothing_is_left_behind(self, tmp_path: Path) -> None:
        folders = {name: tmp_path / name for name in ("XDG_RUNTIME_DIR", "HOME", "TMPDIR", "here")}
        for folder in folders.values():
            folder.mkdir()
        environment = {name: str(folder) for name, folder in folders.items() if name != "here"}
        report = doctor({"OTEL_TRACES_EXPORTER": "none", **environment}, cwd=folders["here"])
        assert report["relay"]["status"] == "ok"
        assert [path for folder in folders.values() for path in folder.rglob("*")] == []
        assert all(not _mentions(pid, folders["XDG_RUNTIME_DIR"]) for pid in processes())

    @pytest.mark.slow
    def test_the_screen_shows_each_check_and_the_cure_below_what_is_wrong(self) -> None:
        done = run_doctor(environment={**QUICK, "OTEL_NPU_EXPORT": "relais"})
        assert done.returncode == 1
        lines = done.stdout.splitlines()
        [row] = [number for number, line in enumerate(lines) if "OTEL_NPU_EXPORT='relais'" in line]
        assert lines[row].startswith("\N{BALLOT X} environment")
        assert lines[row + 1].strip() == "\N{RIGHTWARDS ARROW} takes relay or inprocess"
        assert "\N{CHECK MARK} Python" in done.stdout
        assert "1 failed" in lines[-1]
        assert done.stderr == ""

    @pytest.mark.slow
    def test_it_fits_on_one_screen(self) -> None:
        done = run_doctor(environment=QUICK)
        assert len(done.stdout.splitlines()) <= 24

    @pytest.mark.slow
    def test_a_terminal_without_unicode_gets_words(self) -> None:
        done = run_doctor(environment={**QUICK, "PYTHONIOENCODING": "ascii", "OTEL_NPU_EXPORT": "relais"})
        assert done.stdout.isascii()
        assert "FAILED environment" in done.stdout
        assert "ok     Python" in done.stdout

    def test_an_unknown_option_is_a_usage_error(self) -> None:
        assert run_doctor("--jason", environment=QUICK).returncode == 2


class TestSecrets:
    ENVIRONMENT: ClassVar = {
        "OTEL_EXPORTER_OTLP_HEADERS": "authorization=Bearer%20s3cr%2Bt-token,x-api-key=plain-key",
        "OTEL_EXPORTER_OTLP_TRACES_HEADERS": "misplaced-secret",
        "OTEL_EXPORTER_OTLP_ENDPOINT": "https://user:p%40ssword@collector:4317?key=query-secret",
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "someone:else-password@collector:4317",
    }

    @pytest.mark.parametrize(
        "secret",
        [
            *("s3cr%2Bt-token", "s3cr+t-token", "Bearer s3cr+t-token", "plain-key", "misplaced-secret"),
            *("user:p%40ssword", "p@ssword", "p%40ssword", "query-secret", "else-password"),
        ],
    )
    def test_whatever_quotes_one_is_masked(self, secret: str) -> None:
        shown = masked(f"refused {secret!r}: bad", self.ENVIRONMENT)
        assert secret not in shown
        assert shown.endswith(": bad")

    def test_the_rest_is_left_alone(self) -> None:
        text = "http://collector:4317 (grpc): nothing listens on collector:4317; x-api-key, Bearer%20<token>"
        assert masked(text, self.ENVIRONMENT) == text
        assert masked("http://a:b@host:1/x", {}) == "http://***@host:1/x"

    @pytest.mark.slow
    @pytest.mark.parametrize("arguments", [["--json"], []])
    def test_none_is_in_what_the_command_prints(self, arguments: list[str]) -> None:
        environment = {
            "OTEL_NPU_DEVICE": "cpu",
            "OTEL_EXPORTER_OTLP_HEADERS": "authorization=Bearer%20very-secret",
            "OTEL_EXPORTER_OTLP_TRACES_HEADERS": "malformed-secret",
            "OTEL_EXPORTER_OTLP_ENDPOINT": "http://user:hidden-password@127.0.0.1:1",
        }
        done = run_doctor(*arguments, environment=environment)
        assert "127.0.0.1:1" in done.stdout
        for secret in ("very-secret", "malformed-secret", "hidden-password", "user:"):
            assert secret not in done.stdout + done.stderr


def _mentions(pid: int, folder: Path) -> bool:
    try:
        return os.fsencode(folder) in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
