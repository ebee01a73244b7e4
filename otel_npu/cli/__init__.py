"""The command line: `otel-npu`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command that the arguments name; the entry point of `otel-npu`."""
    # Nothing at the top: the demo's relay lives in this package and needs none of it.
    if sys.argv[1:2] in (["off"], ["on"]):
        from otel_npu.cli.switch import quick

        code = quick(sys.argv[1], sys.argv[2:])
        if code is not None:
            sys.exit(code)
    from otel_npu.cli.app import app

    app(prog_name="otel-npu")
