"""Runs the demo: serves its requests, waits for their spans to come back, draws the slowest, says how to find it."""

from __future__ import annotations

import itertools
import logging
import signal
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

import otel_npu
from otel_npu.capture import switch
from otel_npu.cli.demo import picture
from otel_npu.cli.demo.destination import Destination, name_service, say
from otel_npu.cli.demo.engine import Engine
from otel_npu.cli.demo.front_end import FrontEnd
from otel_npu.cli.demo.receiver import Receiver, exporter_to
from otel_npu.cli.demo.relay import DemoRelay
from otel_npu.cli.demo.traces import Traces, slowest
from otel_npu.cli.demo.workload import Arrivals, requests
from otel_npu.devices.simulated import SimulatedNpu
from otel_npu.relay.exporters import exporters_from_environment
from otel_npu.settings import Settings, SettingsError, sdk_disabled

if TYPE_CHECKING:
    from collections.abc import Callable

    from opentelemetry.sdk.trace.export import SpanExporter

    from otel_npu.cli.demo.traces import Slow

_LOOK_SECONDS: Final = 3.0
_PATIENCE_SECONDS: Final = 60.0  # a relay has to start, perhaps on a machine with better things to do
_GOODBYE_SECONDS: Final = 2.0
_REQUESTS_IN_A_ROUND: Final = 50  # when it runs forever: one of them is slow, and of one the client goes away


def run(count: int, seed: int) -> int:
    """Serve so many requests and draw what came back; returns the exit code."""
    console = Console(highlight=False)
    if _disabled(console):
        return 1
    destination = Destination.from_environment()
    service = name_service()
    try:
        with Receiver() as receiver, DemoRelay(receiver.url, standard=destination.given) as relay:
            switch.enable_on(npu := SimulatedNpu(), Settings(device="simulated"))
            front_end = FrontEnd([exporter_to(receiver.url), *_standard_exporters(destination)])
            try:
                complete = _serve(npu, front_end, count, seed, relay, console)
                if not complete:
                    destination.explain_failure(console, relay.last_words())
            finally:
                otel_npu.disable()
            if not complete:
                relay.kill()
                return 1
            front_end.close()
            traces = Traces(receiver.spans)
            spans = len(receiver.spans)
    except OSError as error:
        say(console, f"The demo's relay can't run: {error}", "red")
        return 1
    whole = len(traces.requests) - len(traces.lacking())
    slow = slowest(traces)
    if slow is not None:
        _draw(traces, slow, console)
    if whole != count:
        say(console, f"Only {whole:,} of {count:,} requests came back whole.", "red")
        return 1
    destination.explain_success(console, spans, service, traces, slow)
    return 0


def run_forever(seed: int) -> int:
    """Serve requests until SIGINT or SIGTERM, as any server would; returns the exit code."""
    console = Console(highlight=False)
    if _disabled(console):
        return 1
    try:
        # Every setting counts here, such as how many steps become traces, and so does a relay that is there already.
        settings = replace(Settings.from_environment(), enabled=True, device="simulated")
    except SettingsError as error:
        say(console, str(error), "red")
        return 1
    destination = Destination.from_environment()
    service = name_service()
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    switch.enable_on(npu := SimulatedNpu(), settings)
    front_end = FrontEnd(_standard_exporters(destination, always=True))
    say(console, f"Serving requests on a simulated NPU until Ctrl-C. Spans go to {destination} as service {service!r}.")
    columns = (SpinnerColumn(style="cyan"), TextColumn("{task.completed:,} requests"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=None)
        engine = _engine(npu, front_end, seed)
        coming = requests(seed, _REQUESTS_IN_A_ROUND, forever=True)
        arrivals = Arrivals(itertools.takewhile(lambda _: not stop.is_set(), coming))
        while not (arrivals.over and engine.idle):
            _step(engine, arrivals)
            progress.update(task, completed=front_end.count)
    taken = otel_npu.flush(_GOODBYE_SECONDS)
    otel_npu.disable()
    front_end.close()
    say(console, f"Ended after {front_end.count:,} requests.")
    if not taken:
        say(console, f"Some spans could not be sent to {destination}.", "red")
    return 0


def _disabled(console: Console) -> bool:
    """`OTEL_SDK_DISABLED` means that nothing is captured, in a demo too."""
    disabled = sdk_disabled()
    if disabled:
        say(console, "OTEL_SDK_DISABLED=true: nothing may be traced, so there is nothing to show.", "red")
    return disabled


def _standard_exporters(destination: Destination, *, always: bool = False) -> list[SpanExporter]:
    """Where the front end's own spans go; of a bad variable the relay, which has the same, says what is wrong."""
    # Their complaints would stand beside the relay's, about the same receiver.
    logging.getLogger("opentelemetry").addHandler(logging.NullHandler())
    logging.getLogger("opentelemetry").propagate = False
    try:
        return exporters_from_environment() if destination.given or always else []
    except Exception:
        return []


def _engine(npu: SimulatedNpu, front_end: FrontEnd, seed: int) -> Engine:
    recorder = switch.current_recorder()
    assert recorder is not None
    return Engine(npu, recorder, seed, front_end.ended)


def _step(engine: Engine, arrivals: Arrivals) -> None:
    for request in arrivals.after_step(idle=engine.idle):
        engine.add(request)
    if not engine.idle:
        engine.run_step()


def _serve(npu: SimulatedNpu, front_end: FrontEnd, count: int, seed: int, relay: DemoRelay, console: Console) -> bool:
    """Serve all requests; whether every span was exported."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(complete_style="cyan", finished_style="cyan", pulse_style="cyan"),
        TextColumn("{task.fields[count]}"),
        TimeElapsedColumn(),
    )
    engine, arrivals = _engine(npu, front_end, seed), Arrivals(requests(seed, count))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("Starting the relay", total=None, count="")
        # A receiver that doesn't answer is noticed now, not after the whole run.
        with otel_npu.stage("warm_up"):
            pass
        if not _arrived(relay):
            return False
        progress.update(task, description="Serving requests on a simulated NPU", total=count)
        while not (arrivals.over and engine.idle):
            _step(engine, arrivals)
            progress.update(task, completed=front_end.count, count=f"{front_end.count:,}/{count:,} requests")
        front_end.flush(_PATIENCE_SECONDS)
        return _arrived(relay)


def _arrived(relay: DemoRelay, now: Callable[[], float] = time.monotonic) -> bool:
    """Whether what was captured so far is exported: waited for as long as nothing says that it won't be."""
    deadline = now() + _PATIENCE_SECONDS
    while not otel_npu.flush(_LOOK_SECONDS):
        if relay.ended or relay.last_words() or now() > deadline:
            return False
    return True


def _draw(traces: Traces, slow: Slow, console: Console) -> None:
    unicode = console.encoding.lower().startswith("utf")
    for line in picture.waterfall(traces, slow, min(console.width, picture.WIDTH), unicode=unicode):
        console.print(line, no_wrap=True, overflow="crop", crop=True)
    console.print()
    say(console, picture.explain(slow))
