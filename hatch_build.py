"""Builds the extension module where there is a compiler. Where there is none, the same is done in Python."""

from __future__ import annotations

import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCE = "otel_npu/_native.c"


class Extension(BuildHookInterface):
    """Compiles `_native`, and makes the wheel one of this platform if that succeeds."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build it into the source tree: an editable installation finds it there, a wheel takes it along."""
        if self.target_name != "wheel" or not sys.platform.startswith("linux"):
            return
        root = Path(self.root)
        module = f"otel_npu/_native{sysconfig.get_config_var('EXT_SUFFIX')}"
        compiler = shlex.split(sysconfig.get_config_var("CC") or "cc")
        flags = ["-O2", "-fPIC", "-shared", "-fvisibility=hidden", f"-I{sysconfig.get_path('include')}"]
        try:
            subprocess.run([*compiler, *flags, SOURCE, "-o", module, "-lm"], cwd=root, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            said = getattr(error, "stderr", b"") or str(error).encode()
            self.app.display_warning(f"built without its extension module: {said.decode(errors='replace')[-500:]}")
            (root / module).unlink(missing_ok=True)
            return
        build_data["artifacts"].append(module)
        build_data["pure_python"] = False
        build_data["infer_tag"] = True
