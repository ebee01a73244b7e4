"""The recorder of a vLLM process, with the exporter's settings as vLLM's own configuration gives them."""

from __future__ import annotations

import functools
import logging
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from otel_npu.capture import switch
from otel_npu.settings import ENABLED_ALIAS, LOG_STAGES, Settings

if TYPE_CHECKING:
    from collections.abc import Callable

    from otel_npu.capture.recorder import Recorder

_log = logging.getLogger("otel_npu")

_TRACES_ENDPOINT: Final = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
_TRACES_PROTOCOL: Final = "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"
_TRACES_INSECURE: Final = "OTEL_EXPORTER_OTLP_TRACES_INSECURE"

_begun = _failed = False


def recorder(endpoint: Callable[[], str | None]) -> Recorder | None:
    """This process's recorder, or None when tracing is off.

    Args:
        endpoint: Gives what vLLM was told by `--otlp-traces-endpoint`. Asked once a process.
    """
    if not _begun:
        _begin(endpoint)
    return None if _failed else switch._recorder or switch.current_recorder()


def config_endpoint(vllm_config: Any) -> Callable[[], str | None]:
    """What a vLLM configuration says about where spans go."""

    def endpoint() -> str | None:
        observability = getattr(vllm_config, "observability_config", None)
        return getattr(observability, "otlp_traces_endpoint", None)

    return endpoint


def environment_endpoint() -> str | None:
    """The same, in a process without the configuration: vLLM's tracer has written it there."""
    return os.environ.get(_TRACES_ENDPOINT)


def settings() -> Settings:
    """The settings by the environment; whoever asked for vllm-ascend's log line by its variable still gets it.

    Raises:
        SettingsError: A variable holds what it does not take.
    """
    read = Settings.from_environment()
    wants_line = os.environ.get(ENABLED_ALIAS, "").strip() and not os.environ.get(LOG_STAGES, "").strip()
    return replace(read, log_stages=True) if wants_line else read


def _begin(endpoint: Callable[[], str | None]) -> None:
    global _begun, _failed  # noqa: PLW0603
    with switch.settling():
        if _begun:
            return
        try:
            chosen = settings()
            if chosen.enabled:
                chosen = replace(chosen, environment=exporter_environment(endpoint()))
                switch.enable(chosen)
                _warn_if_late(chosen)
        except Exception:
            _failed = True
            _log.exception("tracing could not start and is off; vLLM is not affected")
        finally:
            _begun = True  # last: until then whoever asks waits here, and nobody decides by the environment alone


def _warn_if_late(chosen: Settings) -> None:
    recorder = switch.current_recorder()
    if recorder is not None and chosen.environment and recorder.settings.environment != chosen.environment:
        _log.warning(
            "tracing was on before vLLM said where its spans go: otel-npu's go where the OTEL_EXPORTER_* variables say"
        )


def exporter_environment(endpoint: str | None) -> dict[str, str]:
    """What makes a relay export as vLLM does: its flag's endpoint, insecure, and only one variable for the protocol."""
    if not endpoint:
        return {}
    return {
        _TRACES_ENDPOINT: endpoint,
        _TRACES_PROTOCOL: os.environ.get(_TRACES_PROTOCOL, "grpc"),
        _TRACES_INSECURE: "true",
    }


def fault() -> None:
    """Count the fault of ours that is being handled."""
    recorder = switch.current_recorder()
    if recorder is not None:
        recorder.own_fault()


def fault_of(error: BaseException) -> None:
    """Count a fault of ours; what is none goes on."""
    try:
        raise error  # noqa: TRY301 (it is handled from here on)
    except Exception:
        fault()


def guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function whose faults are counted and never vLLM's: it returns None then."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except Exception:
            fault()
            return None

    return call
