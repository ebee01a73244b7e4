"""Hooks, on packages that a test writes."""

from __future__ import annotations

import importlib
import importlib.resources
import importlib.util
import inspect
import logging
import re
import sys
import textwrap
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import SourceFileLoader
from typing import TYPE_CHECKING, Any

import pytest

from otel_npu import hooks
from otel_npu.hooks import Hook

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("no_hooks")

PACKAGE = "hooked_package"
MODULE = f"{PACKAGE}.engine.core"
SOURCE = """
    import functools

    def start(request, *, tokens=1):
        "What it does."
        return ["start"]

    class Base:
        def inherited(self):
            return ["inherited"]

    class Engine(Base):
        limit = 3
        bound = functools.partialmethod(print)

        def step(self, request):
            return ["step"]

        @classmethod
        def make(cls):
            return ["make", cls.__name__]

        @staticmethod
        def count(requests):
            return ["count"]

        @property
        def size(self):
            return ["size"]

        async def drain(self):
            return ["drain"]

        class Queue:
            def put(self):
                return ["put"]
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Writes modules of the package, which can be imported then; the core one if no other is given."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(sources: dict[str, str] | None = None, *, namespace: bool = False) -> None:
        for module, source in (sources or {MODULE: SOURCE}).items():
            path = tmp_path.joinpath(*module.split(".")).with_suffix(".py")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(textwrap.dedent(source))
            for folder in path.relative_to(tmp_path).parents[:-1]:
                if not namespace:
                    (tmp_path / folder / "__init__.py").touch()
        importlib.invalidate_caches()

    yield write
    for name in list(sys.modules):
        if name.partition(".")[0] == PACKAGE:
            del sys.modules[name]


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """The warnings so far."""
    caplog.set_level(logging.WARNING, "otel_npu")
    return lambda: [record.getMessage() for record in caplog.records]


def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: [*function(*args, **kwargs), "wrapped"]


def another(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: [*function(*args, **kwargs), "another"]


def hook(target: str = "start", **fields: Any) -> Hook:
    return Hook(**{"package": PACKAGE, "module": MODULE, "target": target, "wrap": wrap, **fields})


def core() -> Any:
    return importlib.import_module(MODULE)


class TestWhen:
    def test_a_module_that_is_imported_already_is_hooked_at_once(self, write: Callable[..., None]) -> None:
        write()
        module = core()
        hooks.install([hook()])
        assert module.start(1) == ["start", "wrapped"]

    def test_one_that_is_imported_later_is_hooked_then(self, write: Callable[..., None]) -> None:
        write()
        hooks.install([hook()])
        assert PACKAGE not in sys.modules, "to install imports nothing"
        assert core().start(1) == ["start", "wrapped"]

    def test_who_imports_a_function_by_name_gets_the_hooked_one(self, write: Callable[..., None]) -> None:
        write({MODULE: SOURCE, f"{PACKAGE}.user": f"from {MODULE} import start"})
        hooks.install([hook()])
        assert importlib.import_module(f"{PACKAGE}.user").start(1) == ["start", "wrapped"]

    def test_to_install_again_changes_nothing(self, write: Callable[..., None]) -> None:
        write()
        same = hook()
        for _ in range(2):
            hooks.install([same, hook()])
        module = core()
        for _ in range(2):
            hooks.install([same, hook()])
        assert module.start(1) == ["start", "wrapped"]

    def test_two_wrappers_of_one_target_both_apply(self, write: Callable[..., None]) -> None:
        write()
        hooks.install([hook(), hook(wrap=another)])
        assert core().start(1) == ["start", "wrapped", "another"]

    def test_a_module_that_fails_to_execute_is_hooked_when_it_does(
        self, write: Callable[..., None], warnings: Callable[[], list[str]]
    ) -> None:
        write(
            {MODULE: "import sys\nif not hasattr(sys, 'ready'): raise OSError('not yet')\n" + textwrap.dedent(SOURCE)}
        )
        hooks.install([hook()])
        with pytest.raises(OSError, match="not yet"):
            core()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "ready", True, raising=False)
            assert core().start(1) == ["start", "wrapped"]
        assert warnings() == []

    def test_a_module_that_is_just_being_executed_is_hooked_as_it_becomes_complete(
        self, write: Callable[..., None], warnings: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source = """
            import sys
            def early(): return ["early"]
            sys.in_the_middle()
            def late(): return ["late"]
        """
        write({MODULE: source, f"{PACKAGE}.next": ""})
        monkeypatch.setattr(sys, "in_the_middle", lambda: hooks.install([hook("early"), hook("late")]), raising=False)
        module = core()
        assert module.early() == ["early", "wrapped"]
        importlib.import_module(f"{PACKAGE}.next")
        assert module.late() == ["late", "wrapped"]
        assert warnings() == []

    def test_threads_that_install_and_import_at_once_hook_it_once(self, write: Callable[..., None]) -> None:
        write()
        together = threading.Barrier(8)

        def start() -> list[str]:
            together.wait(20)
            hooks.install([hook()])
            started: list[str] = core().start(1)
            return started

        with ThreadPoolExecutor(8) as threads:
            for done in [threads.submit(start) for _ in range(8)]:
                done.result(20)
        assert core().start(1) == ["start", "wrapped"]


class TestWhat:
    @pytest.mark.parametrize(
        ("target", "call", "result"),
        [
            ("start", lambda module: module.start(1), ["start"]),
            ("Engine.step", lambda module: module.Engine().step(1), ["step"]),
            ("Engine.make", lambda module: module.Engine.make(), ["make", "Engine"]),
            ("Engine.count", lambda module: module.Engine().count([]), ["count"]),
            ("Engine.inherited", lambda module: module.Engine().inherited(), ["inherited"]),
            ("Engine.Queue.put", lambda module: module.Engine.Queue().put(), ["put"]),
        ],
    )
    def test_every_kind_of_function_keeps_its_kind(
        self, write: Callable[..., None], target: str, call: Callable[[Any], list[str]], result: list[str]
    ) -> None:
        write()
        hooks.install([hook(target)])
        assert call(core()) == [*result, "wrapped"]

    def test_a_method_of_the_base_stays_as_it_is_for_others(self, write: Callable[..., None]) -> None:
        write()
        hooks.install([hook("Engine.inherited")])
        assert core().Base().inherited() == ["inherited"]

    def test_it_looks_like_what_was_there(self, write: Callable[..., None]) -> None:
        write()
        hooks.install([hook()])
        start = core().start
        assert (start.__name__, start.__doc__, start.__module__) == ("start", "What it does.", MODULE)
        assert list(inspect.signature(start).parameters) == ["request", "tokens"]

    def test_a_wrapper_may_leave_the_function_as_it_is(self, write: Callable[..., None]) -> None:
        write()
        hooks.install([hook(wrap=lambda function: function)])
        start = core().start
        assert start(1) == ["start"]
        assert not hasattr(start, "__wrapped__")


class TestWhatIsNotThere:
    @pytest.mark.parametrize(
        "bad",
        [
            hook("stop"),
            hook("Engine.stop"),
            hook("Machine.step"),
            hook("Engine.limit"),
            hook("Engine.size"),
            hook("Engine.bound"),
            hook("Engine.step", parameters=("request", "context")),
            hook("start", parameters=("tokens", "context")),
            hook(module=f"{PACKAGE}.engine.gone"),
            hook(module=f"{PACKAGE}.gone.core"),
            hook(module=f"{MODULE}.gone"),
            hook("start", wrap=lambda function: 1 / 0),  # a fault of ours
        ],
        ids=lambda bad: f"{bad.module}:{bad.target}",
    )
    @pytest.mark.parametrize("imported", [True, False])
    def test_it_is_one_warning_and_all_else_goes_on(
        self, write: Callable[..., None], warnings: Callable[[], list[str]], bad: Hook, *, imported: bool
    ) -> None:
        write({MODULE: SOURCE, f"{PACKAGE}.other": ""})
        if imported:
            core()
        good = hook("Engine.make")
        for _ in range(2):
            hooks.install([bad, good])
        module = core()
        importlib.import_module(f"{PACKAGE}.other")
        assert module.Engine.make() == ["make", "Engine", "wrapped"]
        assert module.start(1) == ["start"]
        (line,) = warnings()
        assert line.startswith(f"{PACKAGE} (version unknown): {bad.target} in {bad.module} ")
        assert line.endswith("; this hook is left out, the rest goes on")

    def test_the_warning_names_the_version_and_the_parameter(
        self, write: Callable[..., None], warnings: Callable[[], list[str]]
    ) -> None:
        write()
        importlib.import_module(PACKAGE).__dict__["__version__"] = "0.33.0.dev1+cpu"
        hooks.install([hook(parameters=("context", "tokens"))])
        core()
        (line,) = warnings()
        assert line.startswith(f"{PACKAGE} 0.33.0.dev1+cpu: start in {MODULE} does not take context; ")

    def test_a_package_that_is_not_installed_is_nothing_to_speak_of(self, warnings: Callable[[], list[str]]) -> None:
        hooks.install([hook()])
        assert warnings() == []

    def test_it_can_be_asked_without_anything_being_replaced(self, write: Callable[..., None]) -> None:
        write()
        assert hooks.check(hook("stop")) is None, "it is not imported"
        module = core()
        assert hooks.check(hook("stop")) == "is not there"
        assert hooks.check(hook("start", parameters=("request",))) is None
        assert module.start(1) == ["start"]


class TestVersions:
    @pytest.mark.parametrize(
        ("version", "since", "until", "expected"),
        [
            ("0.11.0", "", "", True),
            ("0.11.0", "0.11", "", True),
            ("0.11.0rc1", "0.11.0", "0.18", True),
            ("0.10.2", "0.11.0", "", False),
            ("0.9.1", "0.11.0", "", False),
            ("0.18.0", "", "0.18.0", False),
            ("0.18.0.dev3+g1234", "", "0.18", False),
            ("0.13.0.post1", "", "0.18", True),
            ("0.32.0+cpu", "0.18", "0.32.0", False),
            ("1.0", "0.18", "", True),
            ("dev", "0.18", "", True),
            ("", "", "0.18", True),
        ],
    )
    def test_a_hook_is_for_a_range_of_them(self, version: str, since: str, until: str, *, expected: bool) -> None:
        assert hooks.in_range(hook(since=since, until=until), version) is expected

    @pytest.mark.parametrize(("until", "result"), [("0.13", ["start"]), ("0.14", ["start", "wrapped"])])
    def test_outside_of_it_the_function_stays_and_nobody_hears_of_it(
        self, write: Callable[..., None], warnings: Callable[[], list[str]], until: str, result: list[str]
    ) -> None:
        write()
        importlib.import_module(PACKAGE).__dict__["__version__"] = "0.13.0"
        hooks.install([hook(until=until), hook("gone", until="0.13"), hook(module=f"{PACKAGE}.gone", until="0.13")])
        assert core().start(1) == result
        assert warnings() == []

    def test_a_package_that_does_not_say_its_version_has_the_one_it_was_installed_with(
        self, write: Callable[..., None], tmp_path: Path
    ) -> None:
        write()
        folder = tmp_path / f"{PACKAGE}-0.9.1.dist-info"
        folder.mkdir()
        name = PACKAGE.replace("_", "-")
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.9.1\n")
        hooks._installed_version.cache_clear()
        assert hooks.version(PACKAGE) == "0.9.1"
        hooks._installed_version.cache_clear()

    @pytest.mark.slow
    def test_vllm_is_found_by_whichever_name_it_was_installed(self) -> None:
        pytest.importorskip("vllm.version")
        assert re.match(r"\d+\.\d+", hooks.version("vllm"))
        assert hooks._installed_version("vllm") == hooks.version("vllm")


class TestImports:
    """Who looks at a module that was hooked, or is about to be, sees what is there without us."""

    def test_its_loader_is_its_own(self, write: Callable[..., None], tmp_path: Path) -> None:
        write()
        (tmp_path / PACKAGE / "engine" / "data.txt").write_text("data")
        hooks.install([hook(), hook(module=f"{PACKAGE}.engine")])
        module = core()
        assert module.start(1) == ["start", "wrapped"]
        assert type(module.__loader__) is type(module.__spec__.loader) is SourceFileLoader
        assert "class Engine" in inspect.getsource(module)
        data = importlib.resources.files(f"{PACKAGE}.engine").joinpath("data.txt")
        assert data.read_text() == "data"

    def test_before_it_is_imported_its_loader_answers_as_ever(self, write: Callable[..., None]) -> None:
        write()
        hooks.install([hook()])
        spec = importlib.util.find_spec(MODULE)
        assert spec is not None
        loader: Any = spec.loader
        assert loader.get_source(MODULE) == textwrap.dedent(SOURCE)
        assert loader.is_package(MODULE) is False
        assert loader.get_code(MODULE) is not None
        assert MODULE not in sys.modules
        assert core().start(1) == ["start", "wrapped"]

    def test_a_module_in_a_zip_file_is_hooked(
        self, tmp_path: Path, write: Callable[..., None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "packages.zip"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(f"{PACKAGE}/__init__.py", "")
            archive.writestr(f"{PACKAGE}/engine/__init__.py", "")
            archive.writestr(f"{PACKAGE}/engine/core.py", textwrap.dedent(SOURCE))
        monkeypatch.syspath_prepend(str(path))
        hooks.install([hook()])
        assert core().start(1) == ["start", "wrapped"]

    def test_a_module_in_a_namespace_package_is_hooked(self, write: Callable[..., None]) -> None:
        write(namespace=True)
        hooks.install([hook()])
        assert core().start(1) == ["start", "wrapped"]

    def test_a_namespace_package_has_no_functions(
        self, write: Callable[..., None], warnings: Callable[[], list[str]]
    ) -> None:
        write({MODULE: SOURCE, f"{PACKAGE}.next": ""}, namespace=True)
        hooks.install([hook(module=f"{PACKAGE}.engine")])
        core()
        importlib.import_module(f"{PACKAGE}.next")
        assert len(warnings()) == 1

    def test_a_finder_that_hooks_modules_itself_still_does(self, write: Callable[..., None]) -> None:
        seen = []

        class Finder:
            @staticmethod
            def find_spec(name: str, path: Any = None, target: Any = None) -> None:
                seen.append(name)

        write()
        sys.meta_path.insert(0, Finder())
        hooks.install([hook()])
        sys.meta_path.insert(0, Finder())
        assert core().start(1) == ["start", "wrapped"]
        assert MODULE in seen

    def test_what_the_module_raises_goes_on(self, write: Callable[..., None]) -> None:
        write({MODULE: "1 / 0"})
        hooks.install([hook()])
        with pytest.raises(ZeroDivisionError):
            core()


def test_a_class_that_is_none_for_want_of_what_it_needs_is_left_alone_without_a_word(
    write: Callable[..., None], warnings: Callable[[], list[str]]
) -> None:
    write({MODULE: "Wrapper = None"})
    hooks.install([hook("Wrapper.execute")])
    assert core().Wrapper is None
    assert not warnings()
