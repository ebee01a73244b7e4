"""What those standard `OTEL_*` variables take that are read here: for whoever reads them, and whoever checks them."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import Callable


class BadValue(NamedTuple):
    """A variable that holds what it does not take.

    Attributes:
        shown: The variable and its value; the variable alone where its value may hold a secret.
        takes: What it takes, in words.
    """

    shown: str
    takes: str

    def __str__(self) -> str:
        return f"{self.shown}: takes {self.takes}"


def bad_value(name: str, value: str) -> BadValue | None:
    """What is wrong with a variable's value; None if nothing is, or if the variable is none that is read here."""
    for pattern, (takes, good) in _STANDARD.items():
        if re.fullmatch(pattern, name):
            if good(value):
                return None
            return BadValue(name if name.endswith(("_HEADERS", "_ENDPOINT")) else f"{name}={value!r}", takes)
    return None


def _one_of(*words: str) -> tuple[str, Callable[[str], bool]]:
    return " or ".join(words), lambda value: value.lower() in words


def _whole_number(value: str) -> bool:
    return value.isascii() and value.isdecimal()


def _positive(value: str) -> bool:
    return _whole_number(value) and int(value) > 0


def _port(value: str) -> bool:
    return _whole_number(value) and int(value) < 1 << 16


def _seconds(value: str) -> bool:
    return re.fullmatch(r"\d+(\.\d*)?|\.\d+", value) is not None and float(value) > 0


def _ratio(value: str) -> bool:
    return re.fullmatch(r"\d*\.?\d+|\d+\.", value) is not None and 0 <= float(value) <= 1


def _pairs(value: str) -> bool:
    return all(re.fullmatch(r"[^=\s]+\s*=.*", entry.strip()) for entry in value.split(",") if entry.strip())


def _endpoint(value: str) -> bool:
    try:
        parts = urlsplit(value if "://" in value else f"grpc://{value}")
        return parts.scheme in ("http", "https", "grpc", "grpcs", "unix", "dns") and bool(parts.netloc or parts.path)
    except ValueError:
        return False


def _exporters(value: str) -> bool:
    from importlib.metadata import entry_points  # dear, and seldom wanted

    installed = {point.name for point in entry_points(group="opentelemetry_traces_exporter")}
    return all(name.strip() in {*installed, "otlp", "none"} for name in value.split(",") if name.strip())


_SAMPLERS: Final = tuple(
    f"{parent}{name}" for parent in ("", "parentbased_") for name in ("always_on", "always_off", "traceidratio")
)
_OTLP: Final = "OTEL_EXPORTER_OTLP_(TRACES_|METRICS_)?"
_STANDARD: Final[dict[str, tuple[str, Callable[[str], bool]]]] = {
    "OTEL_SDK_DISABLED": _one_of("true", "false"),
    "OTEL_TRACES_SAMPLER": _one_of(*_SAMPLERS),
    "OTEL_TRACES_SAMPLER_ARG": ("a number from 0 to 1", _ratio),
    "OTEL_TRACES_EXPORTER": ("otlp, none, or the name of an exporter that is installed", _exporters),
    "OTEL_METRICS_EXEMPLAR_FILTER": _one_of("trace_based", "always_on", "always_off"),
    "OTEL_METRIC_EXPORT_(INTERVAL|TIMEOUT)": ("a number of milliseconds above 0", _seconds),
    "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE": _one_of("cumulative", "delta", "lowmemory"),
    "OTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION": _one_of(
        "explicit_bucket_histogram", "base2_exponential_bucket_histogram"
    ),
    "OTEL_EXPORTER_PROMETHEUS_PORT": ("a port, a whole number up to 65535", _port),
    "OTEL_RESOURCE_ATTRIBUTES": ("key=value pairs, separated by commas", _pairs),
    f"{_OTLP}ENDPOINT": ("a URL such as http://collector:4317", _endpoint),
    f"{_OTLP}PROTOCOL": ("grpc or http/protobuf", lambda value: value in ("grpc", "http/protobuf")),
    f"{_OTLP}HEADERS": ("name=value pairs, separated by commas, values percent-encoded", _pairs),
    f"{_OTLP}INSECURE": _one_of("true", "false"),
    f"{_OTLP}COMPRESSION": _one_of("gzip", "deflate", "none"),
    f"{_OTLP}TIMEOUT": ("a number of seconds above 0", _seconds),
    f"{_OTLP}(CERTIFICATE|CLIENT_KEY|CLIENT_CERTIFICATE)": (
        "the path of a file that can be read",
        lambda value: Path(value).is_file() and os.access(value, os.R_OK),
    ),
    "OTEL_BSP_(SCHEDULE_DELAY|MAX_QUEUE_SIZE|MAX_EXPORT_BATCH_SIZE|EXPORT_TIMEOUT)": (
        "a whole number above 0",
        _positive,
    ),
    "OTEL_(SPAN|LINK|EVENT)?_?(ATTRIBUTE|LINK|EVENT)_(COUNT|VALUE_LENGTH)_LIMIT": ("a whole number", _whole_number),
}
