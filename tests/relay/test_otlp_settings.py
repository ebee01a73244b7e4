"""The standard variables say where spans go; a bad one is one line that names it and quotes no secret."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from otel_npu.relay.otlp_settings import ExportError, OtlpSettings

if TYPE_CHECKING:
    from pathlib import Path


def read(protocol: str = "", **variables: str) -> OtlpSettings:
    """What variables say, by their names without `OTEL_EXPORTER_OTLP_`."""
    return OtlpSettings.from_environment(
        protocol,
        {
            name if name.startswith("OTEL_") else f"OTEL_EXPORTER_OTLP_{name}": value
            for name, value in variables.items()
        },
    )


def test_by_default_spans_go_to_a_collector_on_this_host() -> None:
    assert (read().protocol, read().target, read().secure) == ("grpc", "localhost:4317", False)
    assert read(PROTOCOL="http/protobuf").target == "http://localhost:4318/v1/traces"


@pytest.mark.parametrize(
    ("endpoint", "insecure", "target", "secure"),
    [
        ("http://collector:4317", "", "collector:4317", False),
        ("https://collector:4317", "true", "collector:4317", True),
        ("http://collector:4317/v1/traces", "", "collector:4317", False),
        ("  http://collector:4317/  ", "", "collector:4317", False),
        ("grpc://collector:4317", "true", "collector:4317", False),
        ("collector:4317", "", "collector:4317", True),
        ("collector:4317", "true", "collector:4317", False),
        ("127.0.0.1:4317", "false", "127.0.0.1:4317", True),
        ("http://[::1]:4317", "", "[::1]:4317", False),
        ("unix:///run/collector.sock", "true", "unix:///run/collector.sock", False),
        ("https://user:password@collector:4317", "", "collector:4317", True),
    ],
)
def test_endpoints_of_grpc_are_read_as_the_standard_exporter_reads_them(
    endpoint: str, insecure: str, target: str, secure: bool
) -> None:
    settings = read(ENDPOINT=endpoint, INSECURE=insecure)
    assert (settings.target, settings.secure) == (target, secure)


@pytest.mark.parametrize(
    ("variables", "target"),
    [
        ({"ENDPOINT": "http://c:4318"}, "http://c:4318/v1/traces"),
        ({"ENDPOINT": "http://c:4318/"}, "http://c:4318/v1/traces"),
        ({"ENDPOINT": "https://c/otlp"}, "https://c/otlp/v1/traces"),
        ({"ENDPOINT": "https://c/otlp?tenant=a"}, "https://c/otlp/v1/traces?tenant=a"),
        ({"TRACES_ENDPOINT": "http://c:4318/x", "ENDPOINT": "http://other"}, "http://c:4318/x"),
    ],
)
def test_so_are_those_of_http(variables: dict[str, str], target: str) -> None:
    assert read(PROTOCOL="http/protobuf", **variables).target == target


def test_the_variable_for_traces_comes_first_unless_it_is_blank() -> None:
    assert read(TRACES_TIMEOUT="3", TIMEOUT="5").timeout_seconds == 3
    assert read(TRACES_TIMEOUT=" ", TIMEOUT="5").timeout_seconds == 5
    assert read(TRACES_HEADERS="a=1", HEADERS="b=2").headers == (("a", "1"),)
    assert read(TRACES_COMPRESSION="gzip", COMPRESSION="none").compression == "gzip"


def test_an_export_is_never_waited_for_longer_than_the_batch_processor_would() -> None:
    """Many mean milliseconds, as the specification says, where Python's exporters take seconds."""
    assert read(TIMEOUT="10000").timeout_seconds == 30
    assert read(TIMEOUT="10000", OTEL_BSP_EXPORT_TIMEOUT="5000").timeout_seconds == 5
    assert read(TIMEOUT="2").timeout_seconds == 2
    assert read().timeout_seconds == 10


@pytest.mark.parametrize(
    ("value", "headers"),
    [
        ("Authorization=Basic dXNlcjpwYXNz==", {"authorization": "Basic dXNlcjpwYXNz=="}),
        ("Authorization=Basic%20dXNlcjpwYXNz%3D%3D", {"authorization": "Basic dXNlcjpwYXNz=="}),
        ("a=1,, b = 2 ,", {"a": "1", "b": "2"}),
    ],
)
def test_headers_are_pairs_with_their_values_percent_encoded(
    value: str, headers: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    assert dict(read(HEADERS=value).headers) == headers
    assert caplog.records == []


@pytest.mark.parametrize(
    "secret", ["s3cret-token", "Bearer s3cret-token", "x team=s3cret-token", "team=h\u00e9-s3cret-token"]
)
def test_what_is_no_header_is_left_out_with_a_line_that_does_not_quote_it(
    secret: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert read(HEADERS=f"good=1,{secret}").headers == (("good", "1"),)
    [record] = caplog.records
    assert record.getMessage() == (
        "OTEL_EXPORTER_OTLP_HEADERS: takes name=value pairs, separated by commas, values percent-encoded; "
        "1 of its entries left out"
    )


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        *(("TIMEOUT", "10s"), ("TIMEOUT", "-1"), ("TRACES_TIMEOUT", "soon")),
        *(("COMPRESSION", "zstd"), ("INSECURE", "maybe"), ("OTEL_BSP_EXPORT_TIMEOUT", "30s")),
    ],
)
def test_a_bad_value_is_one_line_that_names_it_and_the_default_holds(
    variable: str, value: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert read(**{variable: value}) == read()
    [record] = caplog.records
    assert f"{variable}={value!r}: takes " in record.getMessage()


@pytest.mark.parametrize(
    "variables",
    [
        {"ENDPOINT": '"http://collector:4317"'},
        {"ENDPOINT": "ftp://user:s3cret@collector"},
        {"ENDPOINT": "collector:4318?key=s3cret", "PROTOCOL": "http/protobuf"},
        {"PROTOCOL": "http/json"},
        {"CERTIFICATE": "/nowhere.pem", "ENDPOINT": "https://collector:4317"},
        {"CLIENT_KEY": "/nowhere.pem", "ENDPOINT": "https://collector", "PROTOCOL": "http/protobuf"},
    ],
)
def test_without_some_of_them_nothing_can_be_sent(variables: dict[str, str]) -> None:
    with pytest.raises(ExportError, match=r"^OTEL_EXPORTER_OTLP_\w+(='.*')?: takes ") as error:
        read(**variables)
    assert "s3cret" not in str(error.value)


def test_certificates_are_files(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("")
    settings = read(CERTIFICATE=str(tmp_path / "ca.pem"), ENDPOINT="https://collector:4317")
    assert settings.certificate == str(tmp_path / "ca.pem")


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_what_the_log_calls_it_holds_no_secret(protocol: str) -> None:
    settings = read(PROTOCOL=protocol, TRACES_ENDPOINT="https://user:s3cret@collector:4317/v1/traces?key=s3cret2")
    assert settings.shown in ("https://collector:4317/v1/traces", "collector:4317")
