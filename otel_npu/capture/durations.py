"""`ProfileExecuteDuration`, for code written against vllm-ascend's."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from typing import TYPE_CHECKING, Final

from otel_npu.capture import switch
from otel_npu.capture.stages import Stage

if TYPE_CHECKING:
    from collections.abc import Iterator

_MAX_UNPOPPED: Final = 1024  # who never pops must not fill the memory


class ProfileExecuteDuration:
    """Captures durations asynchronously, to be popped later. One object a process, as in vllm-ascend.

    What is captured is a stage like any other, and is exported too.
    """

    _instance: ProfileExecuteDuration | None = None
    _lock = threading.Lock()

    _captured: deque[Stage]

    def __new__(cls) -> ProfileExecuteDuration:
        """The one object of this process."""
        with cls._lock:
            if cls._instance is None:
                cls._instance = super().__new__(cls)
                cls._instance._captured = deque(maxlen=_MAX_UNPOPPED)
        return cls._instance

    @contextlib.contextmanager
    def capture_async(self, duration_tag: str) -> Iterator[None]:
        """A stage of this name round the body."""
        stage = switch.stage(duration_tag)
        try:
            with stage:
                yield
        finally:
            if isinstance(stage, Stage):
                self._captured.append(stage)

    def pop_captured_sync(self) -> dict[str, float]:
        """Durations of what was captured since the last call, by tag, in milliseconds.

        A tag that was captured more than once has the sum. Waits for the device, because its caller asks for it;
        tracing itself never does. Empty while tracing is off.
        """
        captured = []
        while self._captured:
            captured.append(self._captured.popleft())
        durations: dict[str, float] = {}
        for stage in captured:
            duration_ns = stage.wait()
            durations[stage.name] = durations.get(stage.name, 0.0) + duration_ns * 1e-6
        return durations
