from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.helpers.command_line import start_command

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Iterator, Mapping


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a command that goes on by itself; what still runs at the end of the test is killed."""
    running: list[subprocess.Popen[str]] = []

    def start(*arguments: str, environment: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        running.append(start_command(*arguments, environment=environment))
        return running[-1]

    yield start
    for process in running:
        if process.poll() is None:
            process.kill()
        process.communicate()
