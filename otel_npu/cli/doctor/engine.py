"""The checks of vLLM: its version, what we hook into, and whether it loads our plugin."""

from __future__ import annotations

import os
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Final

from otel_npu import hooks
from otel_npu.cli.doctor import sources
from otel_npu.cli.doctor.findings import Finding, failed, not_applicable, ok, warning

if TYPE_CHECKING:
    from collections.abc import Iterator

VLLM: Final = "vLLM"
VLLM_ASCEND: Final = "vllm-ascend"
HOOKS: Final = "vLLM hooks"
PLUGIN: Final = "vLLM plugin"
LIMITS: Final = "not traced"

_GROUP: Final = "vllm.general_plugins"
_NAME: Final = "otel_npu"
_PLUGINS: Final = "VLLM_PLUGINS"
_RUST: Final = "VLLM_USE_RUST_FRONTEND"
_LIMITS: Final = (
    f"requests through the Rust front end ({_RUST}), and sessions whose input is a stream: there are traces of their "
    "steps, but none of the requests. Ray: vLLM has none on a CPU, so it was never run with it"
)


def versions() -> Iterator[Finding]:
    """Which vLLM is here, if any."""
    for check, package in ((VLLM, "vllm"), (VLLM_ASCEND, "vllm_ascend")):
        if sources.installed(package):
            yield ok(check, sources.version(package) or "installed, of unknown version")
        else:
            yield not_applicable(check, "not installed")


def targets() -> Iterator[Finding]:
    """Whether what we hook into is there, in these versions, by their source: nothing is imported."""
    from otel_npu.vllm.plugin import HOOKS as TABLE

    rows = [
        hook
        for hook in TABLE
        if sources.installed(hook.package) and hooks.in_range(hook, sources.version(hook.package))
    ]
    if not rows:
        yield not_applicable(HOOKS, "vLLM is not installed")
        return
    wrong, unread = [], []
    for hook in rows:
        try:
            complaint = sources.complaint(hook)
        except sources.NoSourceError as error:
            unread.append(f"{hook.target}: {error}")
            continue
        if complaint is not None:
            wrong.append(f"{hook.target} in {hook.module} {complaint}")
    good = len(rows) - len(wrong) - len(unread)
    if wrong:
        yield failed(
            HOOKS,
            f"{len(wrong)} of {len(rows)} targets: {'; '.join(wrong)}",
            "update otel-npu, or use a version of vLLM that its README lists; the other hooks still work",
        )
    elif unread:
        yield warning(HOOKS, f"{good} of {len(rows)} targets found; not checked: {'; '.join(unread)}")
    else:
        yield ok(HOOKS, f"all {len(rows)} targets found")


def plugin() -> Iterator[Finding]:
    """Whether vLLM will load our plugin."""
    if not sources.installed("vllm"):
        yield not_applicable(PLUGIN, "vLLM is not installed")
    elif not entry_points(group=_GROUP, name=_NAME):
        yield failed(
            PLUGIN, f"no entry point {_NAME} in {_GROUP}", "pip install otel-npu into the environment that vLLM runs in"
        )
    elif _PLUGINS in os.environ and _NAME not in os.environ[_PLUGINS].split(","):
        wanted = ",".join([*filter(None, (name.strip() for name in os.environ[_PLUGINS].split(","))), _NAME])
        yield failed(
            PLUGIN,
            f"excluded: {_PLUGINS}={os.environ[_PLUGINS]!r} does not name {_NAME}",
            f"set {_PLUGINS}={wanted}, without spaces, or unset it",
        )
    elif os.environ.get(_RUST, "").strip().lower() in ("1", "true"):
        yield warning(
            PLUGIN, f"{_RUST} is set: that front end runs no Python, so there are step traces but no requests'"
        )
    else:
        yield ok(PLUGIN, f"registered as {_NAME}")


def limits() -> Iterator[Finding]:
    """What of vLLM is not supported, and what is seen then."""
    yield not_applicable(LIMITS, _LIMITS if sources.installed("vllm") else "vLLM is not installed")
