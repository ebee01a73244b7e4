"""Runs the demo: traces the loop, waits for its spans to come back, draws them, says where they went."""

from __future__ import annotations

import itertools
import math
import signal
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

import otel_npu
from otel_npu.capture import switch
from otel_npu.cli.demo import picture
from otel_npu.cli.demo.destination import Destination, name_service, say
from otel_npu.cli.demo.loop import InferenceLoop
from otel_npu.cli.demo.receiver import Receiver
from otel_npu.cli.demo.relay import DemoRelay
from otel_npu.cli.demo.steps import slowest, traced_steps, typical
from otel_npu.devices.simulated import SimulatedNpu
from otel_npu.settings import Settings, SettingsError, sdk_disabled

if TYPE_CHECKING:
    from otel_npu.cli.demo.steps import TracedStep

_FIRST_ANSWER_SECONDS: Final = 5.0
_LAST_ANSWER_SECONDS: Final = 15.0
_GOODBYE_SECONDS: Final = 2.0
_SLOW_STEP_EVERY: Final = 500  # when it runs forever


def run(steps: int, seed: int) -> int:
    """Trace so many steps and draw what came back; returns the exit code."""
    console = Console(highlight=False)
    if _disabled(console):
        return 1
    destination = Destination.from_environment()
    service = name_service()
    try:
        with Receiver() as receiver, DemoRelay(receiver.url, standard=destination.given) as relay:
            switch.enable_on(npu := SimulatedNpu(), Settings(device="simulated", steps_per_second=math.inf))
            try:
                complete = _trace(InferenceLoop(npu, seed, steps), steps, destination, console)
                if not complete:
                    destination.explain_failure(console, relay.last_words())
            finally:
                otel_npu.disable()
            if not complete:
                relay.kill()
                return 1
            spans = receiver.spans
    except OSError as error:
        say(console, f"The demo's relay can't run: {error}", "red")
        return 1
    arrived = traced_steps(spans)
    _draw(arrived, console)
    if len(arrived) != steps:
        say(console, f"Only {len(arrived):,} of {steps:,} steps came back.", "red")
        return 1
    destination.explain_success(console, len(spans), service)
    return 0


def run_forever(seed: int) -> int:
    """Trace steps until SIGINT or SIGTERM, as any program would; returns the exit code."""
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
    loop = InferenceLoop(npu, seed, _SLOW_STEP_EVERY)
    say(console, f"Tracing a simulated NPU until Ctrl-C. Spans go to {destination} as service {service!r}.")
    columns = (SpinnerColumn(style="cyan"), TextColumn("{task.completed:,} steps"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=None)
        for done in itertools.count(1):
            loop.run_step()
            progress.update(task, completed=done)
            if stop.is_set():
                break
    taken = otel_npu.flush(_GOODBYE_SECONDS)
    otel_npu.disable()
    say(console, f"Ended after {done:,} steps.")
    if not taken:
        say(console, f"Some spans could not be sent to {destination}.", "red")
    return 0


def _disabled(console: Console) -> bool:
    """`OTEL_SDK_DISABLED` means that nothing is captured, in a demo too."""
    disabled = sdk_disabled()
    if disabled:
        say(console, "OTEL_SDK_DISABLED=true: nothing may be traced, so there is nothing to show.", "red")
    return disabled


def _trace(loop: InferenceLoop, steps: int, destination: Destination, console: Console) -> bool:
    """Run the loop; whether every span was exported."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(complete_style="cyan", finished_style="cyan", pulse_style="cyan"),
        TextColumn("{task.fields[count]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(
            f"First step to {destination}" if destination.given else "Starting the relay", total=None, count=""
        )
        # A receiver that doesn't answer is noticed now, not after the whole run.
        loop.run_step()
        if not otel_npu.flush(_FIRST_ANSWER_SECONDS):
            return False
        progress.update(task, description="Inference on a simulated NPU", total=steps)
        for done in range(1, steps + 1):
            if done > 1:
                loop.run_step()
            progress.update(task, completed=done, count=f"{done:,}/{steps:,} steps")
        return otel_npu.flush(_LAST_ANSWER_SECONDS)


def _draw(steps: list[TracedStep], console: Console) -> None:
    outlier = slowest(steps)
    if outlier is None:
        return
    shown = {step.number: step for step in (typical(steps, "prefill"), typical(steps, "decode"), outlier.step) if step}
    width = min(console.width, picture.WIDTH)
    unicode = console.encoding.lower().startswith("utf")
    console.print()
    for line in picture.waterfall(list(shown.values()), outlier, width, unicode=unicode):
        console.print(line, no_wrap=True, overflow="crop", crop=True)
    say(console, picture.explain(outlier))
    console.print()
    console.print(picture.stage_table(steps, width))
    console.print()
