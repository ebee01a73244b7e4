"""The commands and their options. What a command needs is imported when it runs, so that `--help` is quick."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003  typer reads it
from typing import Annotated, Final, Optional, TypeAlias

import typer

from otel_npu._version import __version__

_DEFAULT_REQUESTS: Final = 30  # about five seconds
_MIN_REQUESTS: Final = 3  # a slow one, one whose client goes away, and one as all the others
_MAX_REQUESTS: Final = 10_000  # more is what --forever is for

app: Final = typer.Typer(
    help="OpenTelemetry spans with device-measured durations for LLM inference on Ascend NPUs.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"otel-npu {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    *,
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    *,
    requests: Annotated[
        int | None,
        typer.Option(
            min=_MIN_REQUESTS,
            max=_MAX_REQUESTS,
            help="How many requests to serve.",
            show_default=f"{_DEFAULT_REQUESTS}, about 5 s",
        ),
    ] = None,
    forever: Annotated[
        bool, typer.Option("--forever", help="Run until Ctrl-C or SIGTERM, as a source of spans; draws nothing.")
    ] = False,
    seed: Annotated[int, typer.Option(help="The same seed gives the same requests.")] = 1,
) -> None:
    """Serve requests on a simulated NPU, trace them, and draw the slowest from what arrives over OTLP.

    The spans also go to your OTLP endpoint if OTEL_EXPORTER_OTLP_ENDPOINT is set. Needs no NPU and no torch.
    """
    from otel_npu.cli.demo.command import run, run_forever

    if not forever:
        raise typer.Exit(run(requests or _DEFAULT_REQUESTS, seed))
    if requests is not None:
        raise typer.BadParameter("not together with --forever", param_hint="'--requests'")
    raise typer.Exit(run_forever(seed))


@app.command()
def relay(
    *,
    wait: Annotated[
        bool,
        typer.Option("--wait", help="If another relay serves the session, wait for its end; else that is an error."),
    ] = False,
) -> None:
    """Serve this session's socket until SIGTERM, for example in a container of its own.

    Programs find the relay by OTEL_NPU_SESSION: set it to the same value here and there.
    """
    from otel_npu.cli.relay import run

    run(wait=wait)


@app.command()
def doctor(
    *,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")] = False,
) -> None:
    """Check what tracing needs here, and say what to do about what is missing. Changes nothing.

    The exit code is 1 if anything failed. Run it where the program runs: same container, user and environment.
    """
    from otel_npu.cli.doctor.command import run

    raise typer.Exit(run(json=json))


Session: TypeAlias = Annotated[
    Optional[str],  # noqa: UP045  typer reads it where `|` can't be evaluated
    typer.Option("--session", help="Which session, where several run here.", show_default="the only one"),
]
Pid: TypeAlias = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option("--pid", help="The session of this process, or of what it has started.", show_default="any"),
]


@app.command()
def status(
    *,
    session: Session = None,
    pid: Pid = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")] = False,
) -> None:
    """Say who is in a running session, what is on, how many steps a second, and what was left out."""
    from otel_npu.cli.status import run

    raise typer.Exit(run(session, pid, json=json))


@app.command()
def off(*, session: Session = None, pid: Pid = None) -> None:
    """Stop capture in all processes of a running session; they run on. What was captured is exported."""
    from otel_npu.cli.switch import switch

    raise typer.Exit(switch(session, pid, on=False))


@app.command()
def on(*, session: Session = None, pid: Pid = None) -> None:
    """Start capture again, or at last, where OTEL_NPU_ENABLED=standby."""
    from otel_npu.cli.switch import switch

    raise typer.Exit(switch(session, pid, on=True))


@app.command()
def top(
    *,
    session: Session = None,
    pid: Pid = None,
    once: Annotated[bool, typer.Option("--once", help="One table, of three seconds, and no keys.")] = False,
    json: Annotated[bool, typer.Option("--json", help="The same as JSON, for scripts.")] = False,
) -> None:
    """Show what a running session does: steps and tokens a second, its stages and ranks, its slowest step."""
    from otel_npu.cli.top import run

    raise typer.Exit(run(session, pid, once=once, json=json))


@app.command()
def record(
    *,
    seconds: Annotated[float, typer.Option(min=0.1, max=3600, help="For how long.")] = 10.0,
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--output",
            "-o",
            help="Where to: .perfetto.json.gz for ui.perfetto.dev, .json for OTLP JSON lines, .html for a page.",
            show_default="otel-npu-DATE-TIME.perfetto.json.gz",
        ),
    ] = None,
    slowest: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--slowest", min=1, help="Keep so many steps alone, the slowest.", show_default="all"),
    ] = None,
    session: Session = None,
    pid: Pid = None,
) -> None:
    """Record every step of every rank of a running session, whatever is kept as traces otherwise, and its requests.

    Ctrl-C ends it and keeps what there is.
    """
    from otel_npu.cli.record import run

    raise typer.Exit(run(session, pid, seconds, output, slowest))


@app.command()
def report(
    files: Annotated[
        list[Path],
        typer.Argument(
            help="OTLP JSON lines: of `record`, or of a collector's file exporter; several belong together."
        ),
    ],
    *,
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--output", "-o", help="Where to.", show_default="the first file's name, with .html"),
    ] = None,
    compare: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Option("--compare", help="The run before, set beside this one; may be given several times."),
    ] = None,
) -> None:
    """Make one page, which needs nothing but itself, of where the time went. Needs the extra `report`."""
    from otel_npu.cli.report import run

    raise typer.Exit(run(files, output, compare or []))
