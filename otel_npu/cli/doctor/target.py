"""Where the standard variables send spans over OTLP, by the exporters' own rules."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

GENERAL: Final = "OTEL_EXPORTER_OTLP_"
SPECIFIC: Final = "OTEL_EXPORTER_OTLP_TRACES_"
USUAL_PORTS: Final = {"grpc": 4317, "http/protobuf": 4318}


def given_by(name: str) -> str:
    """The variable that counts, the one for traces before the one for all signals; empty if neither is set."""
    return next((prefix + name for prefix in (SPECIFIC, GENERAL) if os.environ.get(prefix + name, "").strip()), "")


def value_of(name: str) -> str:
    """What that variable holds; empty if neither is set."""
    return os.environ.get(given_by(name), "").strip()


@dataclass(frozen=True)
class Target:
    """Where spans go.

    Attributes:
        protocol: `grpc` or `http/protobuf`.
        url: The endpoint as it is given, or the default.
        given: The variable that gives it; empty for the default.
        secure: Whether the exporter speaks TLS there.
    """

    protocol: str
    url: str
    given: str
    secure: bool

    @classmethod
    def from_environment(cls, protocol: str = "") -> Target:
        """What the environment says.

        Args:
            protocol: The one that the exporter's name fixes; empty if the variables say it.
        """
        protocol = protocol or value_of("PROTOCOL") or "grpc"
        url = value_of("ENDPOINT") or f"http://localhost:{USUAL_PORTS.get(protocol, USUAL_PORTS['grpc'])}"
        scheme = urlsplit(url).scheme if "://" in url else ""
        secure = scheme == "https"
        if protocol == "grpc" and not secure:
            insecure = value_of("INSECURE").lower()
            secure = insecure != "true" if insecure else scheme != "http"
        return cls(protocol, url, given_by("ENDPOINT"), secure)

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        parts = urlsplit(self.url if "://" in self.url else f"//{self.url}")
        usual = 443 if self.secure or self.protocol == "grpc" else 80
        return parts.hostname or "localhost", parts.port or usual

    @property
    def variable(self) -> str:
        """The variable to set for another endpoint."""
        return self.given or f"{GENERAL}ENDPOINT"

    def __str__(self) -> str:
        url = self.url.partition("?")[0]
        return f"{url} ({self.protocol}{'' if self.given else ', the default: no endpoint is set'})"
