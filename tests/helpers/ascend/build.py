"""Compiles the simulated Ascend runtime for the installed `torch_npu`.

The wheel links a number of CANN libraries. This module reads from the wheel which libraries and symbols
those are, generates a stub that returns 0 for each symbol, which `runtime.c` overrides where it defines one,
and compiles the libraries.
`torch_npu` itself is not imported: without the libraries it can't be.

`python -m tests.helpers.ascend.build` builds and prints the folder.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.helpers import REPOSITORY

HERE = Path(__file__).resolve().parent
DEFAULT_CACHE = REPOSITORY / ".cache" / "ascend"

_RUNTIME = "libascendcl.so"
# Opened by torch_npu at run time, so the wheel doesn't list it: the operators, of which we need aclnnSleep.
_OPENED_BY_NAME = "libopapi.so"
# Needs a library of its own (libatb) that torch_npu only opens when an operator asks for it.
_OPTIONAL = "libop_plugin_atb.so"


class BuildError(Exception):
    """The simulated runtime can't be built here; the message says why."""


def build(cache_dir: Path = DEFAULT_CACHE) -> Path:
    """Return the folder that holds the libraries, compiling them unless an earlier call already did.

    The folder's name depends on the sources, on the versions of `torch_npu` and Python and on the machine's
    architecture. Safe to call from several processes at once.

    Raises:
        BuildError: gcc, nm, readelf or torch_npu is missing, or the compiler fails.
    """
    packages, version = _find_torch_npu()
    key = hashlib.sha256((HERE / "runtime.c").read_bytes() + Path(__file__).read_bytes())
    key.update(f"{version} {sys.version} {platform.machine()}".encode())
    finished = cache_dir / key.hexdigest()[:16]
    if finished.is_dir():
        return finished
    for tool in ("gcc", "nm", "readelf"):
        if shutil.which(tool) is None:
            raise BuildError(f"{tool} is not on PATH; the simulated Ascend runtime needs gcc and binutils")
    cache_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir, prefix="building-") as temporary:
        folder = Path(temporary) / "libraries"
        folder.mkdir()
        _compile(packages, folder)
        try:
            folder.rename(finished)
        except OSError:  # another process was faster; what it built is the same
            if not finished.is_dir():
                raise
    return finished


def library_names(folder: Path) -> list[str]:
    """Names of the libraries in a folder made by `build`, in an order in which they can be loaded."""
    names = sorted(path.name for path in folder.glob("lib*.so"))
    return sorted(names, key=lambda name: name != _RUNTIME)


def _find_torch_npu() -> tuple[Path, str]:
    """The folder that torch_npu is installed in, and its version."""
    spec = importlib.util.find_spec("torch_npu")
    if spec is None or spec.origin is None:
        raise BuildError("torch_npu is not installed; the simulated Ascend runtime runs behind its wheel")
    return Path(spec.origin).parents[1], importlib.metadata.version("torch_npu")


def _compile(packages: Path, folder: Path) -> None:
    symbols, libraries = _missing(packages)
    stubs = folder / "stubs.c"
    # Weak: where runtime.c defines the symbol too, its definition is the one that counts.
    stub = '__attribute__((weak, visibility("default"))) void *{}(void) {{ return 0; }}\n'
    stubs.write_text("".join(stub.format(symbol) for symbol in sorted(symbols)))
    options = "-std=gnu11 -O2 -Wall -Wextra -fPIC -shared -pthread -fvisibility=hidden"
    gcc = ("gcc", *options.split())
    runtime = str(folder / _RUNTIME)
    _run(*gcc, f"-Wl,-soname,{_RUNTIME}", "-o", runtime, str(HERE / "runtime.c"), str(stubs), "-lm")
    empty = folder / "empty.c"
    empty.touch()
    for name in libraries - {_RUNTIME}:
        # Empty, but dlsym() on it must find the runtime's symbols: so it depends on the runtime.
        link = (f"-Wl,-soname,{name}", "-Wl,--no-as-needed,-rpath,$ORIGIN")
        _run(*gcc, *link, "-o", str(folder / name), str(empty), runtime)


def _missing(packages: Path) -> tuple[set[str], set[str]]:
    """What the wheel links and this machine doesn't have: symbols and libraries."""
    wheel = [*packages.glob("torch_npu/_C*.so"), *packages.glob("torch_npu/lib/*.so")]
    wheel = [path for path in wheel if path.name != _OPTIONAL]
    torch = [*packages.glob("torch/lib/*.so*"), *packages.glob("torch.libs/*.so*")]
    installed = {path.name for path in wheel + torch}
    needed = {name for path in wheel + torch for name in _needed(path)} - installed
    # gcc answers with a path for a library that it finds, with the bare name for one that it doesn't.
    found = {name: Path(_run("gcc", f"-print-file-name={name}").strip()) for name in needed}
    libraries = {name for name, path in found.items() if not path.is_absolute()}
    defining = [*wheel, *torch, *(path for path in found.values() if path.is_absolute())]
    defined = {symbol for path in defining for symbol in _symbols(path, "--defined-only")}
    undefined = {symbol for path in wheel for symbol in _symbols(path, "--undefined-only")}
    # Python's own come from the interpreter; no library has to be linked for them.
    symbols = {symbol for symbol in undefined - defined if not symbol.startswith(("Py", "_Py"))}
    return symbols, libraries | {_OPENED_BY_NAME}


def _needed(library: Path) -> set[str]:
    return set(re.findall(r"\(NEEDED\).*\[(.+)\]", _run("readelf", "-dW", str(library))))


def _symbols(library: Path, which: str) -> set[str]:
    """Dynamic symbols without their versions, and without undefined weak ones: those may stay undefined."""
    lines = [line.split() for line in _run("nm", "-D", which, str(library)).splitlines()]
    return {words[-1].split("@")[0] for words in lines if len(words) >= 2 and words[-2] not in "wv"}


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BuildError(f"{' '.join(command)} failed: {done.stderr.strip()}")
    return done.stdout


if __name__ == "__main__":
    sys.stdout.write(f"{build()}\n")
