"""`otel-npu doctor` sends one span to where spans are to go, and says why it was not taken."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import socket
import ssl
import subprocess
import sys
import threading
from concurrent import futures
from typing import TYPE_CHECKING, Any

import grpc
import pytest
import trustme
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc

from otel_npu import semconv
from otel_npu.cli.doctor.target import Target
from tests.helpers.doctored import NOT_INHERITED, QUICK, assert_red, doctor

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.helpers.receiver import Receiver

pytestmark = pytest.mark.slow

LOCALHOST = "127.0.0.1"
EXPORTED = {name: value for name, value in QUICK.items() if name != "OTEL_TRACES_EXPORTER"}


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def authority_file(authority: trustme.CA, tmp_path: Path) -> str:
    path = tmp_path / "authority.pem"
    authority.cert_pem.write_to_path(str(path))
    return str(path)


class Answering(http.server.BaseHTTPRequestHandler):
    """Answers every request with the server's code."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(self.server.code)  # type: ignore[attr-defined]
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def http_server(code: int = 200, context: ssl.SSLContext | None = None) -> Iterator[int]:
    """The port of a server that answers so, over TLS if there is a context for it."""
    with http.server.ThreadingHTTPServer((LOCALHOST, 0), Answering) as server:
        server.code = code  # type: ignore[attr-defined]
        server.handle_error = lambda *_: None  # type: ignore[method-assign]  # handshakes are to fail here
        if context is not None:
            server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


class Refusing(trace_service_pb2_grpc.TraceServiceServicer):
    """Answers every export with one status."""

    def __init__(self, status: grpc.StatusCode | None) -> None:
        self._status = status

    def Export(self, request: Any, context: Any) -> Any:  # noqa: N802
        if self._status is None:
            return trace_service_pb2_grpc.trace__service__pb2.ExportTraceServiceResponse()  # type: ignore[attr-defined]
        context.abort(self._status, "no")
        return None


@contextlib.contextmanager
def grpc_server(status: grpc.StatusCode | None, credentials: grpc.ServerCredentials | None = None) -> Iterator[int]:
    """The port of a server that answers so."""
    server = grpc.server(futures.ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Refusing(status), server)  # type: ignore[no-untyped-call]
    address = f"{LOCALHOST}:0"
    port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    server.start()
    try:
        yield port
    finally:
        server.stop(grace=None).wait()


def endpoint(where: dict[str, str]) -> dict[str, str]:
    """What the check of the endpoint alone says, in the process that the doctor has for it."""
    done = subprocess.run(
        [sys.executable, "-m", "otel_npu.cli.doctor.apart", "endpoint"],
        env={**{name: value for name, value in os.environ.items() if name not in NOT_INHERITED}, **where},
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
    )
    finding: dict[str, str] = json.loads(done.stdout)
    return finding


def environment(url: str, protocol: str = "grpc", **more: str) -> dict[str, str]:
    return {**EXPORTED, "OTEL_EXPORTER_OTLP_ENDPOINT": url, "OTEL_EXPORTER_OTLP_PROTOCOL": protocol, **more}


@pytest.fixture
def server_context(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(LOCALHOST).configure_cert(context)
    return context


@pytest.fixture
def server_credentials(authority: trustme.CA) -> grpc.ServerCredentials:
    certificate = authority.issue_cert(LOCALHOST)
    chain = b"".join(part.bytes() for part in certificate.cert_chain_pems)
    return grpc.ssl_server_credentials([(certificate.private_key_pem.bytes(), chain)])


def closed_port() -> int:
    with socket.socket() as free:
        free.bind((LOCALHOST, 0))
        port: int = free.getsockname()[1]
        return port


class TestGreen:
    @pytest.mark.parametrize("kind", ["grpc", "http"])
    def test_one_test_span_arrives_under_the_services_name(self, receiver: Receiver, kind: str) -> None:
        where = receiver.grpc_environment if kind == "grpc" else receiver.http_environment
        report = doctor({**EXPORTED, **where, "OTEL_SERVICE_NAME": "chat"})
        assert report.code == 0
        assert "took a test span" in report["endpoint"]["found"]
        [span] = receiver.spans
        assert (span.name, span.scope) == (semconv.DOCTOR_TEST, semconv.SCOPE)
        assert span.resource["service.name"] == "chat"

    def test_over_tls(self, server_context: ssl.SSLContext, authority_file: str) -> None:
        with http_server(200, server_context) as port:
            trusted = {"OTEL_EXPORTER_OTLP_CERTIFICATE": authority_file}
            finding = endpoint(environment(f"https://{LOCALHOST}:{port}", "http/protobuf", **trusted))
        assert finding["status"] == "ok"

    def test_what_is_not_sent_over_otlp_is_not_tried(self) -> None:
        finding = endpoint({**EXPORTED, "OTEL_TRACES_EXPORTER": "console"})
        assert finding["status"] == "not_applicable"


class TestDown:
    @pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
    def test_nothing_listens(self, protocol: str) -> None:
        report = doctor(environment(f"http://{LOCALHOST}:{closed_port()}", protocol))
        assert report.code == 1
        assert_red(report["endpoint"], "nothing listens on", "start a collector there, or set OTEL_EXPORTER_OTLP")

    def test_a_name_that_nobody_has(self) -> None:
        finding = endpoint(environment("http://collector.invalid:4318", "http/protobuf"))
        assert_red(finding, "collector.invalid is unknown", "correct OTEL_EXPORTER_OTLP_ENDPOINT")

    def test_something_listens_and_never_answers(self) -> None:
        with socket.socket() as silent:
            silent.bind((LOCALHOST, 0))
            silent.listen(64)
            finding = endpoint(environment(f"http://{LOCALHOST}:{silent.getsockname()[1]}", "http/protobuf"))
        assert_red(finding, "did not answer in time", "collector is overloaded")


class TestWrongProtocol:
    def test_grpc_to_a_port_for_http(self, receiver: Receiver) -> None:
        report = doctor(environment(f"http://{LOCALHOST}:{receiver.http_port}", "grpc"))
        assert report.code == 1
        assert_red(report["endpoint"], "wrong protocol", "OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf")
        assert "4317" in report["endpoint"]["cure"]

    def test_http_to_a_port_for_grpc(self, receiver: Receiver) -> None:
        finding = endpoint(environment(f"http://{LOCALHOST}:{receiver.grpc_port}", "http/protobuf"))
        assert_red(finding, "wrong protocol", "OTEL_EXPORTER_OTLP_PROTOCOL=grpc")
        assert "4318" in finding["cure"]

    def test_a_path_that_takes_no_traces(self) -> None:
        with http_server(404) as port:
            where = {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"http://{LOCALHOST}:{port}"}
            finding = endpoint({**EXPORTED, **where, "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"})
        assert_red(finding, "takes no traces on this path", "has to end in /v1/traces")


class TestTls:
    @pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
    def test_an_authority_that_is_not_trusted(
        self, protocol: str, server_context: ssl.SSLContext, server_credentials: grpc.ServerCredentials
    ) -> None:
        server = grpc_server(None, server_credentials) if protocol == "grpc" else http_server(200, server_context)
        with server as port:
            report = doctor(environment(f"https://{LOCALHOST}:{port}", protocol))
        assert report.code == 1
        assert_red(report["endpoint"], "TLS refused: the server's certificate", "OTEL_EXPORTER_OTLP_CERTIFICATE")

    def test_whom_requests_is_told_to_trust_counts_more(
        self, server_context: ssl.SSLContext, authority_file: str, tmp_path: Path
    ) -> None:
        trustme.CA().cert_pem.write_to_path(str(tmp_path / "other.pem"))
        trusted = {"OTEL_EXPORTER_OTLP_CERTIFICATE": authority_file, "REQUESTS_CA_BUNDLE": str(tmp_path / "other.pem")}
        with http_server(200, server_context) as port:
            finding = endpoint(environment(f"https://{LOCALHOST}:{port}", "http/protobuf", **trusted))
        assert_red(finding, "TLS refused: the server's certificate", "the file of REQUESTS_CA_BUNDLE")

    @pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
    def test_no_tls_to_a_port_that_wants_it(
        self, protocol: str, server_context: ssl.SSLContext, server_credentials: grpc.ServerCredentials
    ) -> None:
        server = grpc_server(None, server_credentials) if protocol == "grpc" else http_server(200, server_context)
        with server as port:
            finding = endpoint(environment(f"http://{LOCALHOST}:{port}", protocol))
        assert_red(finding, "TLS refused: it is spoken there", "https:// in OTEL_EXPORTER_OTLP_ENDPOINT")

    @pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
    def test_tls_to_a_port_that_has_none(self, protocol: str, receiver: Receiver) -> None:
        port = receiver.grpc_port if protocol == "grpc" else receiver.http_port
        finding = endpoint(environment(f"https://{LOCALHOST}:{port}", protocol))
        assert_red(finding, "TLS refused: it is not spoken there", "http:// in OTEL_EXPORTER_OTLP_ENDPOINT")

    def test_an_endpoint_without_a_scheme_means_tls(self, receiver: Receiver) -> None:
        url = f"{LOCALHOST}:{receiver.grpc_port}"
        finding = endpoint(environment(url))
        assert_red(finding, "TLS refused: it is not spoken there", "OTEL_EXPORTER_OTLP_INSECURE=true")
        cured = endpoint(environment(url, OTEL_EXPORTER_OTLP_INSECURE="true"))
        assert cured["status"] == "ok"

    def test_a_server_that_asks_for_the_clients_certificate(
        self, authority: trustme.CA, authority_file: str, server_context: ssl.SSLContext, tmp_path: Path
    ) -> None:
        server_context.verify_mode = ssl.CERT_REQUIRED
        authority.configure_trust(server_context)
        with http_server(200, server_context) as port:
            where = environment(
                f"https://{LOCALHOST}:{port}", "http/protobuf", OTEL_EXPORTER_OTLP_CERTIFICATE=authority_file
            )
            finding = endpoint(where)
            assert_red(finding, "asks for a client certificate", "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE")
            own = authority.issue_cert("client.invalid")
            own.private_key_pem.write_to_path(str(tmp_path / "key"))
            own.cert_chain_pems[0].write_to_path(str(tmp_path / "certificate"))
            where["OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE"] = str(tmp_path / "certificate")
            where["OTEL_EXPORTER_OTLP_CLIENT_KEY"] = str(tmp_path / "key")
            assert endpoint(where)["status"] == "ok"


class TestAuthentication:
    @pytest.mark.parametrize("status", [grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED])
    def test_refused_over_grpc(self, status: grpc.StatusCode) -> None:
        with grpc_server(status) as port:
            report = doctor(environment(f"http://{LOCALHOST}:{port}"))
        assert report.code == 1
        assert_red(report["endpoint"], "authentication refused", "set OTEL_EXPORTER_OTLP_HEADERS")

    @pytest.mark.parametrize("code", [401, 403])
    def test_refused_over_http(self, code: int) -> None:
        with http_server(code) as port:
            given = {"OTEL_EXPORTER_OTLP_HEADERS": "authorization=Bearer%20not-this-one"}
            report = doctor(environment(f"http://{LOCALHOST}:{port}", "http/protobuf", **given))
        assert_red(report["endpoint"], "authentication refused", "credentials in OTEL_EXPORTER_OTLP_HEADERS")
        assert "not-this-one" not in report.output

    def test_another_refusal_is_told_as_it_came(self) -> None:
        with grpc_server(grpc.StatusCode.INVALID_ARGUMENT) as port:
            finding = endpoint(environment(f"http://{LOCALHOST}:{port}"))
        assert_red(finding, "INVALID_ARGUMENT", "the collector's log")


class TestTarget:
    @pytest.mark.parametrize(
        ("url", "protocol", "insecure", "address", "secure"),
        [
            ("http://host:4317", "grpc", "", ("host", 4317), False),
            ("https://host", "grpc", "true", ("host", 443), True),
            ("host:4317", "grpc", "", ("host", 4317), True),
            ("grpc://host:1", "grpc", "true", ("host", 1), False),
            ("http://host:4317", "grpc", "false", ("host", 4317), True),
            ("http://[::1]:4318/v1/traces", "http/protobuf", "", ("::1", 4318), False),
            ("https://host/otlp", "http/protobuf", "", ("host", 443), True),
            ("http://host", "http/protobuf", "true", ("host", 80), False),
            ("", "grpc", "", ("localhost", 4317), False),
            ("", "http/protobuf", "", ("localhost", 4318), False),
        ],
    )
    def test_it_follows_the_exporters_rules(
        self,
        monkeypatch: pytest.MonkeyPatch,
        url: str,
        protocol: str,
        insecure: str,
        address: tuple[str, int],
        secure: bool,
    ) -> None:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", protocol)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_INSECURE", insecure)
        target = Target.from_environment()
        assert (target.protocol, target.address, target.secure) == (protocol, address, secure)
