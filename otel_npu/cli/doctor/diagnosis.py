"""Why a receiver did not take a span: from what the exporter said, and from a look at the wire."""

from __future__ import annotations

import os
import re
import socket
import ssl
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, NamedTuple

from otel_npu.cli.doctor.findings import first_line
from otel_npu.cli.doctor.target import GENERAL, SPECIFIC, USUAL_PORTS, given_by, value_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from otel_npu.cli.doctor.target import Target

_LOOK_SECONDS: Final = 1.5
_UNAUTHORIZED: Final = re.compile(
    r"\b(401|403|unauthorized|forbidden|unauthenticated|permission_denied)\b", re.IGNORECASE
)
_WRONG_PATH: Final = re.compile(r"\b(404|405|not found|method not allowed|unimplemented)\b", re.IGNORECASE)
_TOO_SLOW: Final = re.compile(r"deadline.exceeded|timed? ?out", re.IGNORECASE)
# An HTTP/2 client's first words, with an empty SETTINGS frame. A server's own first frame is of that type, too:
# three bytes of length, then the type.
_HTTP2_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
_HTTP2_SETTINGS: Final = re.compile(rb"...\x04", re.DOTALL)


class Trouble(NamedTuple):
    """What is wrong, and what to do about it."""

    found: str
    cure: str


def explain(target: Target, said: str) -> Trouble:
    """Why the span was not taken.

    Args:
        target: Where it was sent.
        said: What the exporter logged.
    """
    for look in (_authentication, _reach, _missing_tls, _tls, _protocol, _path, _slowness):
        trouble = look(target, said)
        if trouble is not None:
            return trouble
    return Trouble(f"refused: {first_line(said)}", "the collector's log says why")


def _authentication(_target: Target, said: str) -> Trouble | None:
    if not _UNAUTHORIZED.search(said):
        return None
    given = given_by("HEADERS")
    if given:
        return Trouble("authentication refused", f"see whether the credentials in {given} are right")
    return Trouble("authentication refused", f"set {GENERAL}HEADERS, for example authorization=Bearer%20<token>")


def _reach(target: Target, _said: str) -> Trouble | None:
    host, port = target.address
    try:
        with _connected(target):
            return None
    except socket.gaierror:
        return Trouble(f"the name {host} is unknown", f"correct {target.variable}")
    except TimeoutError:
        return Trouble(f"no answer from {host}:{port}", "see whether a firewall or a NetworkPolicy lies between")
    except OSError as error:
        return Trouble(
            f"nothing listens on {host}:{port} ({error.strerror or error})",
            f"start a collector there, or set {target.variable} to where one listens",
        )


def _missing_tls(target: Target, _said: str) -> Trouble | None:
    """Whether TLS is spoken there, where the exporter doesn't."""
    if target.secure:
        return None
    try:
        with _connected(target, _trusting()):
            pass
    except OSError:
        return None
    cure = f"write https:// in {target.variable}"
    if target.protocol == "grpc" and value_of("INSECURE"):
        cure += f", and unset {given_by('INSECURE')}"
    return Trouble("TLS refused: it is spoken there, and the exporter does not", cure)


def _tls(target: Target, _said: str) -> Trouble | None:
    """Whether the exporter's TLS fails there."""
    if not target.secure:
        return None
    agreed = False
    try:
        with _connected(target, _exporters_own(target)) as connection:
            agreed = True
            # With TLS 1.3 a server that misses the client's certificate says so after the handshake only.
            connection.sendall(_HTTP2_PREFACE)
            connection.recv(1)
    except ssl.SSLCertVerificationError as error:
        found = f"TLS refused: the server's certificate is not trusted ({error.verify_message})"
        return Trouble(found, _trust_cure(_authority(target)))
    except ssl.SSLError as error:
        return _tls_alert(target, str(error), agreed=agreed)
    except OSError:
        pass
    return None


def _authority(target: Target) -> str:
    """The variable that names whom the exporter trusts; empty if it is the system's authorities."""
    # The HTTP exporter sends by `requests`, for which these count more than what it is told.
    bundles = () if target.protocol == "grpc" else ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
    return next((name for name in bundles if os.environ.get(name)), given_by("CERTIFICATE"))


def _trust_cure(authority: str) -> str:
    if not authority:
        return f"set {GENERAL}CERTIFICATE to the file of the authority that signed the server's certificate"
    cure = f"see whether the file of {authority} holds the authority that signed the server's certificate for this name"
    if authority in (f"{SPECIFIC}CERTIFICATE", f"{GENERAL}CERTIFICATE"):
        return cure
    return f"{cure}; it counts more than {GENERAL}CERTIFICATE"


def _tls_alert(target: Target, alert: str, *, agreed: bool) -> Trouble:
    if agreed or "HANDSHAKE_FAILURE" in alert:
        cure = f"set {GENERAL}CLIENT_CERTIFICATE and {GENERAL}CLIENT_KEY"
        return Trouble("TLS refused: the server asks for a client certificate", cure)
    cure = f"write http:// in {target.variable}"
    if target.protocol == "grpc" and "://" not in target.url:
        cure += f", or set {GENERAL}INSECURE=true: without a scheme TLS is meant"
    return Trouble("TLS refused: it is not spoken there, and the exporter does", cure)


def _protocol(target: Target, _said: str) -> Trouble | None:
    """Whether the other protocol is spoken there."""
    spoken = _spoken(target)
    if spoken is None or spoken == target.protocol:
        return None
    port = USUAL_PORTS[target.protocol]
    return Trouble(
        f"wrong protocol: {spoken} is spoken there",
        f"set {given_by('PROTOCOL') or GENERAL + 'PROTOCOL'}={spoken}, "
        f"or take the port for {target.protocol}, often {port}",
    )


def _spoken(target: Target) -> str | None:
    """The protocol that is spoken there; None if that can't be told."""
    if _HTTP2_SETTINGS.match(_answer(target, _HTTP2_PREFACE)):
        return "grpc"
    request = f"OPTIONS / HTTP/1.1\r\nHost: {target.address[0]}\r\nConnection: close\r\n\r\n"
    return "http/protobuf" if _answer(target, request.encode()).startswith(b"HTTP/1") else None


def _answer(target: Target, greeting: bytes) -> bytes:
    """The beginning of what comes back for a greeting; empty if nothing does."""
    try:
        with _connected(target, _trusting() if target.secure else None) as connection:
            connection.sendall(greeting)
            return connection.recv(16)
    except OSError:
        return b""


def _path(target: Target, said: str) -> Trouble | None:
    if not _WRONG_PATH.search(said):
        return None
    if target.protocol == "grpc":
        cure = f"take the collector's port for OTLP over gRPC, often {USUAL_PORTS['grpc']}"
    elif target.given.startswith(SPECIFIC):
        cure = f"{target.given} is taken as it is: it has to end in /v1/traces"
    else:
        cure = f"take the collector's port for OTLP over HTTP, often {USUAL_PORTS['http/protobuf']}, without a path"
    return Trouble("what listens there takes no traces on this path", cure)


def _slowness(_target: Target, said: str) -> Trouble | None:
    if not _TOO_SLOW.search(said):
        return None
    return Trouble("connected, but it did not answer in time", "see whether the collector is overloaded")


@contextmanager
def _connected(target: Target, context: ssl.SSLContext | None = None) -> Iterator[socket.socket]:
    """A connection, with TLS by this context if there is one.

    Raises:
        OSError: It can't be had; `ssl.SSLError` is one.
    """
    with socket.create_connection(target.address, _LOOK_SECONDS) as connection:
        if context is None:
            yield connection
        else:
            with context.wrap_socket(connection, server_hostname=target.address[0]) as secured:
                yield secured


def _trusting() -> ssl.SSLContext:
    """For a look at what is there: nothing but a greeting is sent."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def _exporters_own(target: Target) -> ssl.SSLContext:
    """What the exporter checks the server by, and shows of itself."""
    context = ssl.create_default_context(cafile=os.environ.get(_authority(target), "").strip() or None)
    certificate = value_of("CLIENT_CERTIFICATE")
    if certificate:
        context.load_cert_chain(certificate, value_of("CLIENT_KEY") or None)
    return context
