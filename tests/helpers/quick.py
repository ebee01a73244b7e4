"""Quick tests stay quick: one that takes long without being marked as slow is named at the end, and so are too many.

Processor time counts, with that of the processes that a test has waited for: a busy machine does not change it much.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Generator

# Four times what they may take on an idle machine: on a busy one a processor does half as much in a second.
SECONDS_EACH = 8.0
SECONDS_TOGETHER = 300.0

_taken: dict[str, float] = {}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Measure a test that is not marked as slow."""
    before = _processor_seconds()
    result = yield
    if item.get_closest_marker("slow") is None:
        _taken[item.nodeid] = _processor_seconds() - before
    return result


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark as slow what runs on the simulated Ascend: to load torch_npu takes seconds, in each process that has one.

    Files with slow tests come first where several processes share them: they are then done at about the same time.
    """
    for item in items:
        if "loaded_ascend" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)
    if not hasattr(config, "workerinput"):
        return
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take over what one of several processes has measured."""
    _taken.update(getattr(node, "workeroutput", {}).get("taken", {}))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand over what this one has."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["taken"] = _taken


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what the quick tests took, and what is none."""
    if _taken:
        terminalreporter.write_line(f"{len(_taken)} quick tests took {sum(_taken.values()):.0f} s of processor time")
    for complaint in _complaints():
        terminalreporter.write_line(complaint, red=True)


def _complaints() -> list[str]:
    complaints = [
        f"{test} took {seconds:.0f} s of processor time: mark it with pytest.mark.slow"
        for test, seconds in _taken.items()
        if seconds > SECONDS_EACH
    ]
    if sum(_taken.values()) > SECONDS_TOGETHER:
        complaints.append("`make test-quick` is no longer quick: mark the longest tests with pytest.mark.slow")
    return complaints


def _processor_seconds() -> float:
    return sum(os.times()[:4])
