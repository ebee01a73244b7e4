"""No credential reaches a log, whatever goes wrong with it."""

from __future__ import annotations

import logging
import socket
import sys
from typing import TYPE_CHECKING

import pytest

from otel_npu.secrets import MaskingFormatter
from tests.helpers.receiver import Answer
from tests.helpers.traced import Programs, eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.helpers.receiver import Receiver

SECRET = "s3cr%2Bt-token"
FORMS = ("s3cr%2Bt-token", "s3cr+t-token")


@pytest.fixture
def programs(tmp_path: Path) -> Iterator[Programs]:
    with Programs(tmp_path) as running:
        yield running


@pytest.fixture
def closed() -> Iterator[str]:
    """Host and port where nobody listens."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{bound.getsockname()[1]}"


@pytest.mark.parametrize(
    ("protocol", "endpoint", "headers"),
    [
        ("grpc", "http://user:{secret}@{closed}", ""),
        ("grpc", "user:{secret}@{closed}", "authorization=Bearer%20{secret}"),
        ("http/protobuf", "http://user:{secret}@{closed}/v1/traces?api_key={secret}", ""),
        ("http/protobuf", "http://{closed}", "authorization=Bearer%20{secret},{secret}"),
        ("http/protobuf", "{secret}@{closed}", "x-api-key={secret}%0a"),
    ],
)
@pytest.mark.slow
def test_what_is_wrong_is_told_without_it(
    programs: Programs, closed: str, protocol: str, endpoint: str, headers: str
) -> None:
    worker = programs.start(
        {
            "OTEL_EXPORTER_OTLP_PROTOCOL": protocol,
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": endpoint.format(secret=SECRET, closed=closed),
            "OTEL_EXPORTER_OTLP_HEADERS": headers.format(secret=SECRET),
        }
    )
    assert worker.ask("steps(1) and otel_npu.flush(1)") is False
    said = (closed, "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT: takes a URL")
    eventually(lambda: any(text in programs.log for text in said), "what is wrong is told")
    worker.leave()
    eventually(lambda: not programs.relays(), "the relay has ended")
    assert not [form for form in FORMS if form in programs.log]


def test_a_receiver_that_quotes_it_is_masked_too(programs: Programs, receiver: Receiver) -> None:
    receiver.answer = lambda _: Answer("UNAUTHENTICATED", 401, "bad authorization: Bearer s3cr+t-token")
    worker = programs.start(
        {**receiver.grpc_environment, "OTEL_EXPORTER_OTLP_HEADERS": f"authorization=Bearer%20{SECRET}"}
    )
    assert worker.ask("steps(1) and otel_npu.flush(20)") is False
    worker.leave()
    eventually(lambda: not programs.relays(), "the relay has ended")
    assert "refuses spans: UNAUTHENTICATED: bad authorization: " in programs.log
    assert not [form for form in FORMS if form in programs.log]


def test_whatever_a_library_logs_in_the_relay_is_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", f"authorization=Bearer%20{SECRET}")
    try:
        float("Bearer s3cr+t-token")
    except ValueError:
        record = logging.LogRecord("lib", logging.ERROR, "", 0, "sent %s", ("s3cr%2Bt-token",), sys.exc_info())
    text = MaskingFormatter("%(message)s").format(record)
    assert text.startswith("sent ***\nTraceback")
    assert not [form for form in FORMS if form in text]
