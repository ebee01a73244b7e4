"""Off and on: the public functions, and the one recorder behind them while tracing is on."""

from __future__ import annotations

import atexit
import contextlib
import copyreg
import logging
import os
import sys
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from otel_npu import announce
from otel_npu.capture import arguments
from otel_npu.capture.decorate import maker
from otel_npu.capture.off import OffStage, OffStep
from otel_npu.capture.recorder import EXIT_SECONDS, Recorder
from otel_npu.capture.records import Handle, new_stage, new_step
from otel_npu.capture.stages import Stage
from otel_npu.capture.steps import Step
from otel_npu.interrupts import from_outside
from otel_npu.native import native
from otel_npu.settings import Settings, SettingsError, sdk_disabled

if TYPE_CHECKING:
    from collections.abc import Iterable
    from contextlib import AbstractContextManager

    from otel_npu.capture.decorate import AnyStage
    from otel_npu.devices.device import Device

_log = logging.getLogger("otel_npu")

_MAX_OFF_STAGES: Final = 1024
_FORK_SECONDS: Final = 5.0
_OFF_STEP: Final = OffStep()

_recorder: Recorder | None = None
_switched_off: Recorder | None = None
"""The one that somebody at the relay has switched off: it waits to be switched on again."""
_decided = False
"""Whether it is settled that tracing is on or off; the first stage or step settles it by the environment."""
_forked_from: Settings | None = None
"""In a forked child, until it captures: what tracing was like in its parent."""
_off_stages: dict[str, OffStage] = {}
"""Filled only while it is settled that tracing is off; shared by all who ask for the same name."""
_closing: list[Recorder] = []
_inherited: list[object] = []
_lock = threading.RLock()
"""Held while it is settled whether tracing is on, and by whoever forks."""


def stage(name: str, /, **attributes: Any) -> AnyStage:
    """A stage of inference: the time on the device's stream between entering and leaving.

    A context manager, or a decorator of a function, a coroutine function, or a generator function of either kind, of
    which it measures the whole iteration. What it measures are two events on the
    current stream, waits included: it is not how long the device was busy. A stage inside another is its child; one
    outside of any step is a trace of its own. An exception passes through and marks the stage.

    Args:
        name: The stage's name, such as `forward`. Few different ones: the name groups spans.
        attributes: Attributes of the span: strings, numbers, flags, or lists of one of these.

    Raises:
        TypeError: There is no name: a function stands in its place.
    """
    recorder = _recorder
    if recorder is not None:
        if type(name) is not str:
            arguments.no_name(name)
            name = arguments.text(name)
        # Attributes as they are now: a list may change before the device has finished.
        taken = arguments.attributes(attributes, recorder.drops) if attributes else attributes
        return new_stage(Stage, recorder, name, taken)
    if attributes:
        return stage(name, **attributes) if not _decided and _decide() else _off_stage(name, attributes)
    try:
        return _off_stages[name]
    except KeyError:
        return stage(name) if not _decided and _decide() else _off_stage(name, {})
    except TypeError:  # what can't be looked up is no name either, but no reason to fail
        return stage(arguments.text(name))


def step(kind: str = "", /, *, requests: Iterable[Any] = (), **attributes: Any) -> Handle | OffStep:
    """A step of inference, to which the stages inside belong: a trace of its own, or part of the active one.

    A context manager, or `handle = step(...).open()` and later `handle.close()`.

    Args:
        kind: What the step does, such as `prefill`, `decode`, `mixed` or `dummy`. Traces are kept at
            `OTEL_NPU_STEPS_PER_SECOND` for each kind.
        requests: The requests that the step serves, each a W3C traceparent, an OpenTelemetry span or a span
            context; the step is linked to them.
        attributes: Attributes of the span, as for `stage`.

    Raises:
        TypeError: `requests` is a text, or nothing that can be iterated over, or a function stands in the place of
            the kind.
    """
    if type(kind) is not str:
        arguments.no_kind(kind)
    taken = arguments.requests(requests) if requests != () else ()
    recorder = _recorder
    if recorder is not None:
        if type(kind) is not str:
            kind = arguments.text(kind)
        said = arguments.attributes(attributes, recorder.drops) if attributes else None
        return Handle(new_step(Step, recorder, kind, taken, said))
    if not _decided and _decide():
        return step(kind, requests=taken, **attributes)
    return _OFF_STEP


def enable(settings: Settings | None = None) -> bool:
    """Turn tracing on; whether it is on now. Where it is on already, or `otel-npu off` has been said, nothing changes.

    Args:
        settings: What to choose. Without them the environment is read, but for `OTEL_NPU_ENABLED`; a bad variable
            is one line in the log, and tracing stays off.

    Raises:
        TypeError: They are no `Settings`.
    """
    if settings is not None and not isinstance(settings, Settings):
        raise TypeError(f"enable() takes otel_npu.Settings(...), not {type(settings).__name__}")
    return _turn_on(settings, None)


def disable() -> None:
    """Turn tracing off. What was captured is still exported; this waits for it, at most 2 seconds."""
    global _decided  # noqa: PLW0603
    with _lock:
        _decided = True
    _turn_all_off()
    _close_all()


def flush(timeout_seconds: float = 5.0) -> bool:
    """Resolve and export what was captured so far.

    Waits for the device to finish the steps that are closed, without synchronising it, and for the relay.

    Args:
        timeout_seconds: How long this may take.

    Returns:
        Whether all of it was exported in time. True when tracing is off: there is nothing.

    Raises:
        TypeError: The time is no number.
    """
    if not isinstance(timeout_seconds, (int, float)):
        raise TypeError(f"flush() takes a number of seconds, not {type(timeout_seconds).__name__}")
    recorder = _recorder or _switched_off
    return True if recorder is None else recorder.flush(timeout_seconds)


def current_recorder() -> Recorder | None:
    """The recorder, deciding first whether there is one."""
    if _recorder is None and not _decided:
        _decide()
    return _recorder


def enable_on(device: Device, settings: Settings) -> None:
    """Turn tracing on with a device that is already at hand, such as a simulated one."""
    _turn_on(settings, device)


def settling() -> AbstractContextManager[bool]:
    """To be held while it is settled whether tracing is on, and how: others wait, and nobody forks meanwhile."""
    return _lock


def turn_off(recorder: Recorder) -> None:
    """Capture nothing any more with this recorder."""
    global _recorder, _switched_off  # noqa: PLW0603
    with _lock:
        if recorder in (_recorder, _switched_off):
            _recorder = _switched_off = None
            _closing.append(recorder)


def switch(recorder: Recorder, on: bool) -> bool:
    """Capture with this recorder again, or capture nothing for the moment; whether it captures now."""
    global _recorder, _switched_off
    with _lock:
        if recorder in (_recorder, _switched_off):
            _recorder, _switched_off = (recorder, None) if on else (None, recorder)
        return _recorder is recorder


def _decide() -> bool:
    """Settle by the environment whether tracing is on; whether it is.

    That it is settled is said last: until then whoever asks waits here, and nobody takes it for off.
    """
    global _decided, _forked_from  # noqa: PLW0603
    with _lock:
        if _decided:
            return _recorder is not None
        announce.unknown_names()
        if _forked_from is not None:
            settings, _forked_from = _forked_from, None
            return _turn_on(settings, None)
        try:
            settings = Settings.from_environment()
        except SettingsError as error:
            _log.error("%s; tracing is off", error)
            _decided = True
            return False
        if settings.enabled:
            return _turn_on(settings, None)
        _decided = True
        return False


def _turn_on(settings: Settings | None, device: Device | None) -> bool:
    global _recorder, _switched_off, _decided  # noqa: PLW0603
    with _lock:
        try:
            if _recorder is None and _switched_off is None:
                recorder = _begin(settings, device)
                if recorder is not None and recorder.settings.standby:
                    _switched_off = recorder
                    recorder.stand_by()
                    announce.stands_by()
                else:
                    _recorder = recorder
            return _recorder is not None
        finally:
            _decided = True


def _begin(settings: Settings | None, device: Device | None) -> Recorder | None:
    if sdk_disabled() or (settings is not None and not settings.enabled):
        return None
    try:
        if settings is None:  # to be asked for is enough, and a forked child is as its parent
            settings = replace(Settings.from_environment(), enabled=True)
        recorder = Recorder(settings, device, turn_off, switch)
    except SettingsError as error:
        _log.error("%s; tracing is off", error)
        return None
    except Exception as error:
        if from_outside(error):
            raise
        _log.exception("tracing could not start and is off; the program is not affected")
        return None
    if settings.log_stages:
        _make_visible()
    if settings.stages:
        from otel_npu import named_stages

        named_stages.install(settings.stages)
    _close_at_exit()
    return recorder


def _step_again(kind: str, attributes: dict[str, Any]) -> Handle | OffStep:
    return step(kind, **attributes)


def _reduce(handle: Handle) -> tuple[Any, ...]:
    """A copy is a step like any other of this kind, and not open; what this one has measured is its own."""
    return _step_again, (handle.step.kind, handle.step.attributes or {})


def _off_stage(name: str, attributes: dict[str, Any]) -> OffStage:
    arguments.no_name(name)
    off = OffStage(name, attributes)
    if not attributes and len(_off_stages) < _MAX_OFF_STAGES:
        _off_stages[name] = off
    return off


def _make_visible() -> None:
    """Lines that were asked for must not be lost because nobody has set up logging."""
    if not _log.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s %(asctime)s [%(name)s] %(message)s"))
        _log.addHandler(handler)
    if not _log.isEnabledFor(logging.INFO):
        _log.setLevel(logging.INFO)


def _close_all() -> None:
    while _closing:
        _closing.pop().close(EXIT_SECONDS)


def _turn_all_off() -> None:
    for recorder in (_recorder, _switched_off):
        if recorder is not None:
            turn_off(recorder)


def _at_exit() -> None:
    _turn_all_off()
    _close_all()


def _close_at_exit() -> None:
    atexit.unregister(_at_exit)
    atexit.register(_at_exit)  # the last to register is the first to run: before torch_npu shuts the device down
    multiprocessing_util = sys.modules.get("multiprocessing.util")
    if multiprocessing_util is not None and sys.modules["multiprocessing"].parent_process() is not None:
        # A forked child of multiprocessing leaves by os._exit, past atexit.
        multiprocessing_util.Finalize(None, _at_exit, exitpriority=100)


def _before_fork() -> None:
    """Nobody turns tracing on just now: the child would wait for ever for what it holds, be it a lock of tempfile's.

    Not for ever here: where the other thread does not come to an end, the program's fork matters more.
    """
    _lock.acquire(timeout=_FORK_SECONDS)


def _after_fork_in_parent() -> None:
    with contextlib.suppress(RuntimeError):  # it could not be had
        _lock.release()


def _after_fork_in_child() -> None:
    """The child begins anew: threads, locks, sockets and device events are its parent's."""
    global _recorder, _switched_off, _decided, _forked_from, _lock  # noqa: PLW0603
    _lock = threading.RLock()
    parent = _recorder or _switched_off
    if parent is not None:
        _decided, _forked_from = False, replace(parent.settings, standby=_recorder is None)
        _recorder = _switched_off = None
        _off_stages.clear()  # whoever finds one there does not ask whether tracing is on
        parent.abandon()
        # Never destroyed: its events belong to a device context that this process does not have.
        _inherited.append(parent)
    _inherited.extend(_closing)
    _closing.clear()


if native is not None:
    # The functions above, where they are called with a name alone: without an interpreter.
    stage, step = native.stand_in_front(globals(), _off_stages, Stage, Step, stage, step, "otel_npu")

maker.make = stage
copyreg.pickle(Handle, _reduce)
os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
