"""What a receiver answers, over gRPC and over HTTP, is understood for what it means."""

from __future__ import annotations

import socket
import time
from email.utils import formatdate
from typing import TYPE_CHECKING

import pytest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.trace import SpanContext

from otel_npu.relay import otlp
from otel_npu.relay.encoding import encode_request
from otel_npu.relay.otlp import OtlpExporter, otlp_exporter
from otel_npu.relay.otlp_settings import ExportError, OtlpSettings
from otel_npu.relay.outcomes import Later, Never, Outcome, Taken, TooLarge
from tests.helpers.receiver import Answer
from tests.helpers.traced import PATIENCE_SECONDS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.helpers.receiver import Receiver

PROTOCOLS = ("grpc", "http/protobuf")


def span(name: str = "forward", text: str = "") -> ReadableSpan:
    context = SpanContext(1, 2, is_remote=False)
    return ReadableSpan(name, context, None, Resource({}), {"text": text}, start_time=1, end_time=2)


class Way:
    """An exporter to the receiver, by its variables and others."""

    def __init__(self, receiver: Receiver, protocol: str) -> None:
        self.protocol = protocol
        self.environment = receiver.grpc_environment if protocol == "grpc" else receiver.http_environment
        self._exporters: list[OtlpExporter] = []

    def exporter(self, **environment: str) -> OtlpExporter:
        settings = OtlpSettings.from_environment(environment={**self.environment, **environment})
        self._exporters.append(otlp_exporter(settings))
        return self._exporters[-1]

    def send(self, *spans: ReadableSpan, timeout_seconds: float = PATIENCE_SECONDS, **environment: str) -> Outcome:
        return self.exporter(**environment).send(encode_request(spans or [span()]), timeout_seconds)

    def close(self) -> None:
        for exporter in self._exporters:
            exporter.shutdown()


@pytest.fixture(params=PROTOCOLS)
def way(request: pytest.FixtureRequest, receiver: Receiver) -> Iterator[Way]:
    to_receiver = Way(receiver, request.param)
    yield to_receiver
    to_receiver.close()


def test_spans_are_taken(way: Way, receiver: Receiver) -> None:
    assert way.send(span("one"), span("two")) == Taken()
    assert [one.name for one in receiver.spans] == ["one", "two"]


@pytest.mark.parametrize("compression", ["gzip", "deflate", "none", "GZIP"])
def test_compressed_too(way: Way, receiver: Receiver, compression: str) -> None:
    assert way.send(span(text="x" * 10_000), OTEL_EXPORTER_OTLP_COMPRESSION=compression) == Taken()
    assert len(receiver.spans[0].attributes["text"]) == 10_000


def test_headers_go_with_every_request(way: Way, receiver: Receiver) -> None:
    way.send(OTEL_EXPORTER_OTLP_HEADERS="Authorization=Bearer%20abc, x-team = npu")
    assert (receiver.headers["authorization"], receiver.headers["x-team"]) == ("Bearer abc", "npu")
    assert receiver.headers["user-agent"].startswith("otel-npu/")


def test_what_is_rejected_is_said_with_its_reason(way: Way, receiver: Receiver) -> None:
    receiver.answer = Answer(rejected=3, details="quota exceeded")
    assert way.send() == Taken(3, "quota exceeded")


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("UNAVAILABLE", 503),
        ("DEADLINE_EXCEEDED", 504),
        ("ABORTED", 502),
        ("RESOURCE_EXHAUSTED", 429),
        ("CANCELLED", 500),
    ],
)
def test_some_answers_mean_later(way: Way, receiver: Receiver, code: str, status: int) -> None:
    receiver.answer = Answer(code, status, "not now")
    outcome = way.send()
    assert isinstance(outcome, Later)
    assert outcome.after_seconds is None
    assert (code if way.protocol == "grpc" else str(status)) in outcome.error
    assert outcome.error.endswith("not now")


@pytest.mark.parametrize(("code", "status"), [("RESOURCE_EXHAUSTED", 429), ("UNAVAILABLE", 503)])
def test_some_say_when(way: Way, receiver: Receiver, code: str, status: int) -> None:
    receiver.answer = Answer(code, status, "slow down", after_seconds=30)
    outcome = way.send()
    assert isinstance(outcome, Later)
    assert outcome.after_seconds == 30


@pytest.mark.parametrize(
    ("code", "status"),
    [
        *(("INVALID_ARGUMENT", 400), ("UNAUTHENTICATED", 401), ("PERMISSION_DENIED", 403), ("UNIMPLEMENTED", 404)),
        ("UNIMPLEMENTED", 501),
    ],
)
def test_some_mean_never(way: Way, receiver: Receiver, code: str, status: int) -> None:
    receiver.answer = Answer(code, status, "no")
    outcome = way.send()
    assert isinstance(outcome, Never)
    assert (code if way.protocol == "grpc" else str(status)) in outcome.error


@pytest.mark.parametrize(
    ("code", "details"),
    [
        ("RESOURCE_EXHAUSTED", "grpc: received message larger than max (6800000 vs. 4194304)"),
        ("OUT_OF_RANGE", "Error, decoded message length too large: found 5 bytes, the limit is: 4 bytes"),
    ],
)
def test_some_mean_less_at_once(way: Way, receiver: Receiver, code: str, details: str) -> None:
    receiver.answer = Answer(code, 413, details)
    assert isinstance(way.send(), TooLarge)


def test_a_stock_grpc_receiver_says_so_by_itself(receiver: Receiver) -> None:
    way = Way(receiver, "grpc")
    assert isinstance(way.send(span(text="x" * 5_000_000)), TooLarge)
    way.close()


def test_one_that_does_not_answer_in_time_is_later(way: Way, receiver: Receiver) -> None:
    receiver.delay_seconds = PATIENCE_SECONDS
    outcome = way.send(timeout_seconds=0.2)
    assert isinstance(outcome, Later)
    assert "time" in outcome.error.lower() or "deadline" in outcome.error.lower()


def test_one_that_is_not_there_is_later_and_taken_when_it_is(way: Way) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        outcome = way.send(OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{bound.getsockname()[1]}")
    assert isinstance(outcome, Later)
    assert "refused" in outcome.error


def test_as_one_of_the_standard_exporters_it_says_whether_all_was_taken(way: Way, receiver: Receiver) -> None:
    exporter = way.exporter()
    assert exporter.export([span()]) is SpanExportResult.SUCCESS
    receiver.answer = Answer(rejected=1)
    assert exporter.export([span()]) is SpanExportResult.FAILURE
    receiver.answer = Answer("UNAVAILABLE", 503)
    assert exporter.export([span()]) is SpanExportResult.FAILURE


def test_a_redirect_is_not_taken_for_success(receiver: Receiver) -> None:
    """A POST that is redirected becomes a GET, which any web page answers with 200."""
    receiver.answer = Answer("ABORTED", 302)
    way = Way(receiver, "http/protobuf")
    assert isinstance(way.send(), Never)
    way.close()


@pytest.mark.parametrize(("value", "seconds"), [("7", 7), (" 0 ", 0), ("soon", None), ("", None), ("-1", None)])
def test_retry_after_is_seconds(value: str, seconds: float | None) -> None:
    assert otlp._retry_after_seconds(value) == seconds


def test_or_a_date() -> None:
    for local in (False, True):
        seconds = otlp._retry_after_seconds(formatdate(time.time() + 100, usegmt=not local, localtime=local))
        assert seconds is not None
        assert 90 < seconds <= 100
    assert otlp._retry_after_seconds(formatdate(0)) == 0


def test_a_provider_of_credentials_that_is_not_there_is_one_clear_error(receiver: Receiver) -> None:
    way = Way(receiver, "http/protobuf")
    with pytest.raises(ExportError, match="'vault' is not installed"):
        way.exporter(OTEL_PYTHON_EXPORTER_OTLP_HTTP_CREDENTIAL_PROVIDER="vault")
