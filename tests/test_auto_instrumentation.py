"""A program that uses OpenTelemetry stays what it was: its provider, its exporter, its environment are its own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.helpers.receiver import Receiver
from tests.helpers.traced import Programs

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.slow

INSTRUMENT = Path(sys.executable).with_name("opentelemetry-instrument")

# Speaks before and after tracing is on, and traces a step inside a span of its own.
PROGRAM = """
import json, os, sys
import otel_npu
from opentelemetry import trace

{setup}

def provider():
    # What it is made of: who replaces or adds anything changes this.
    own = trace.get_tracer_provider()
    processors = own._active_span_processor._span_processors
    return [id(own), [(id(processor), id(processor.span_exporter)) for processor in processors]]

def environment():
    ours = "OTEL_NPU_SESSION"
    return {{name: value for name, value in os.environ.items() if name.startswith("OTEL_") and name != ours}}

before = provider(), environment()
with trace.get_tracer("program").start_as_current_span("request"):
    with otel_npu.step("decode"):
        with otel_npu.stage("forward"):
            pass
assert otel_npu.flush(20)
assert (provider(), environment()) == before
trace.get_tracer_provider().force_flush()
print(json.dumps("done"), flush=True)
sys.stdin.read()
"""

OWN_PROVIDER = """
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
own = TracerProvider(resource=Resource.create({{"service.name": "own"}}))
own.add_span_processor(BatchSpanProcessor(OTLPSpanExporter("{endpoint}", insecure=True)))
trace.set_tracer_provider(own)
"""


@pytest.fixture
def programs(tmp_path: Path) -> Iterator[Programs]:
    with Programs(tmp_path) as running:
        yield running


def write(programs: Programs, setup: str = "") -> str:
    path = programs.folder / "program.py"
    path.write_text(PROGRAM.format(setup=setup))
    return str(path)


@pytest.mark.skipif(not INSTRUMENT.exists(), reason="opentelemetry-instrument is not installed")
def test_under_opentelemetry_instrument_our_spans_join_the_programs_trace(
    programs: Programs, receiver: Receiver
) -> None:
    environment = {
        **receiver.grpc_environment,
        "OTEL_SERVICE_NAME": "chat",
        "OTEL_TRACES_EXPORTER": "otlp",
        "OTEL_METRICS_EXPORTER": "none",
        "OTEL_LOGS_EXPORTER": "none",
    }
    command = [str(INSTRUMENT), sys.executable, write(programs)]
    program = programs.start(environment, command=command)
    assert program.answer() == "done"
    program.leave()
    # Nothing but these: no exporter's own requests are traced, in the program or in the relay.
    spans = {span.name: span for span in receiver.wait_for(3)}
    assert sorted(spans) == ["forward", "request", "worker_step"]
    assert len(receiver.spans) == 3
    assert spans["worker_step"].parent_span_id == spans["request"].span_id
    assert spans["forward"].parent_span_id == spans["worker_step"].span_id
    assert {span.trace_id for span in spans.values()} == {spans["request"].trace_id}
    assert {span.resource["service.name"] for span in spans.values()} == {"chat"}
    assert spans["request"].resource["telemetry.auto.version"]
    assert "Error" not in programs.log


def test_a_provider_of_the_programs_own_keeps_its_exporter(programs: Programs, receiver: Receiver) -> None:
    with Receiver() as own_receiver:
        endpoint = own_receiver.grpc_environment["OTEL_EXPORTER_OTLP_ENDPOINT"]
        source = write(programs, OWN_PROVIDER.format(endpoint=endpoint))
        program = programs.start(receiver.http_environment, command=[sys.executable, source])
        assert program.answer() == "done"
        program.leave()
        [request] = own_receiver.spans
        step, stage = sorted(receiver.wait_for(2), key=lambda span: span.name, reverse=True)
        assert (request.name, request.resource["service.name"]) == ("request", "own")
        assert (step.name, step.parent_span_id) == ("worker_step", request.span_id)
        assert (stage.name, stage.trace_id) == ("forward", request.trace_id)
        assert len(receiver.spans) == 2
