"""The command line: `otel-npu`."""

from __future__ import annotations


def main() -> None:
    """Run the command that the arguments name; the entry point of `otel-npu`."""
    # Not at the top: the demo's relay lives in this package and needs none of it.
    from otel_npu.cli.app import app

    app(prog_name="otel-npu")
