"""What is wrong with a configuration of an OpenTelemetry Collector, by the documentation of its components.

The keys are those of the collector and its contributed components 0.159.0 and of Jaeger 2.20.0: for each component
that is used here, what its documentation names, so that a misspelt one is found without the collector itself.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# What a value is: checks it and says what it should have been.
Kind = tuple["Callable[[Any], bool]", str]

_DURATION: Final = re.compile(r"(\d+(\.\d+)?(ns|us|µs|ms|s|m|h))+")
_ENVIRONMENT: Final = re.compile(r"\$\{env:[A-Z_][A-Z0-9_]*(:-[^}]*)?\}")

TEXT: Final[Kind] = (lambda value: isinstance(value, str) and bool(value), "a text")
FLAG: Final[Kind] = (lambda value: isinstance(value, bool), "true or false")
WHOLE: Final[Kind] = (
    lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= 0,
    "a whole number, 0 or more",
)
NUMBER: Final[Kind] = (lambda value: isinstance(value, (int, float)) and not isinstance(value, bool), "a number")
DURATION: Final[Kind] = (
    lambda value: isinstance(value, str) and _DURATION.fullmatch(value) is not None,
    "a duration such as 1s",
)
SIZER: Final[Kind] = (lambda value: value in ("requests", "items", "bytes"), "requests, items or bytes")
ADDRESS: Final[Kind] = (
    lambda value: (
        isinstance(value, str)
        and re.fullmatch(r"((dns:///|https?://)?[\w.-]+:\d+)|(https?://\S+)", _ENVIRONMENT.sub("a:1", value))
        is not None
    ),
    "an address with a port",
)
LIST: Final[Kind] = (lambda value: isinstance(value, list) and bool(value), "a list")
TEXTS: Final[Kind] = (
    lambda value: isinstance(value, dict) and all(isinstance(text, str) for text in value.values()),
    "texts by name",
)

_TLS: Final = {
    **dict.fromkeys(("insecure", "insecure_skip_verify", "include_system_ca_certs_pool"), FLAG),
    **dict.fromkeys(("ca_file", "ca_pem", "cert_file", "cert_pem", "key_file", "key_pem"), TEXT),
    **dict.fromkeys(("server_name_override", "min_version", "max_version"), TEXT),
    **dict.fromkeys(("cipher_suites", "curve_preferences"), LIST),
    "reload_interval": DURATION,
}
_GRPC_SERVER: Final = {
    "endpoint": ADDRESS,
    "transport": TEXT,
    "max_recv_msg_size_mib": WHOLE,
    "max_concurrent_streams": WHOLE,
    "read_buffer_size": WHOLE,
    "write_buffer_size": WHOLE,
    "include_metadata": FLAG,
    "tls": _TLS,
}
_HTTP_SERVER: Final = {
    "endpoint": ADDRESS,
    "include_metadata": FLAG,
    "max_request_body_size": WHOLE,
    **dict.fromkeys(("read_timeout", "read_header_timeout", "write_timeout", "idle_timeout"), DURATION),
    "response_headers": TEXTS,
    "tls": _TLS,
}
_BATCH: Final = {"flush_timeout": DURATION, "min_size": WHOLE, "max_size": WHOLE, "sizer": SIZER}
_QUEUE: Final = {
    **dict.fromkeys(("enabled", "wait_for_result", "block_on_overflow"), FLAG),
    "num_consumers": WHOLE,
    "queue_size": WHOLE,
    "sizer": SIZER,
    "storage": TEXT,
    "batch": _BATCH,
}
_RETRY: Final = {
    "enabled": FLAG,
    **dict.fromkeys(("initial_interval", "max_interval", "max_elapsed_time"), DURATION),
    **dict.fromkeys(("multiplier", "randomization_factor"), NUMBER),
}
DOCUMENTED: Final[dict[str, dict[str, dict[str, Any]]]] = {
    "receivers": {
        "otlp": {
            "protocols": {
                "grpc": _GRPC_SERVER,
                "http": {
                    **_HTTP_SERVER,
                    **dict.fromkeys(("traces_url_path", "metrics_url_path", "logs_url_path"), TEXT),
                },
            }
        },
    },
    "processors": {
        "memory_limiter": {
            "check_interval": DURATION,
            **dict.fromkeys(
                ("limit_mib", "spike_limit_mib", "limit_percentage", "spike_limit_percentage"),
                WHOLE,
            ),
            **dict.fromkeys(
                (
                    *("min_gc_interval_when_soft_limited", "min_gc_interval_when_hard_limited"),
                    *("max_gc_interval_when_soft_limited", "max_gc_interval_when_hard_limited"),
                ),
                DURATION,
            ),
        },
    },
    "exporters": {
        "otlp_grpc": {
            "endpoint": ADDRESS,
            **dict.fromkeys(("authority", "balancer_name", "compression", "user_agent"), TEXT),
            "headers": TEXTS,
            "wait_for_ready": FLAG,
            **dict.fromkeys(("read_buffer_size", "write_buffer_size"), WHOLE),
            "keepalive": {"permit_without_stream": FLAG, "time": DURATION, "timeout": DURATION},
            "timeout": DURATION,
            "tls": _TLS,
            "sending_queue": _QUEUE,
            "retry_on_failure": _RETRY,
        },
        "otlp_http": {
            "endpoint": TEXT,
            **dict.fromkeys(("metrics_endpoint", "traces_endpoint", "compression", "encoding"), TEXT),
            "headers": TEXTS,
            **dict.fromkeys(("read_buffer_size", "write_buffer_size"), WHOLE),
            "timeout": DURATION,
            "tls": _TLS,
            "sending_queue": _QUEUE,
            "retry_on_failure": _RETRY,
        },
        "jaeger_storage_exporter": {"trace_storage": TEXT, "queue": _QUEUE, "retry_on_failure": _RETRY},
    },
    "extensions": {
        "health_check": {**_HTTP_SERVER, "path": TEXT, "response_body": {"healthy": TEXT, "unhealthy": TEXT}},
        "file_storage": {
            "directory": TEXT,
            "timeout": DURATION,
            **dict.fromkeys(("fsync", "create_directory"), FLAG),
            "directory_permissions": TEXT,
            "compaction": {
                **dict.fromkeys(("on_start", "on_rebound", "cleanup_on_start"), FLAG),
                "directory": TEXT,
                **dict.fromkeys(
                    ("max_transaction_size", "rebound_needed_threshold_mib", "rebound_trigger_threshold_mib"), WHOLE
                ),
                "check_interval": DURATION,
            },
        },
        "jaeger_storage": {"backends": {"<name>": {"memory": {"max_traces": WHOLE}}}},
        "jaeger_query": {
            "storage": {"traces": TEXT, "traces_archive": TEXT, "metrics": TEXT},
            "base_path": TEXT,
            "max_clock_skew_adjust": DURATION,
            "http": _HTTP_SERVER,
            "grpc": _GRPC_SERVER,
        },
    },
}
_REQUIRED: Final = {
    "memory_limiter": ("check_interval",),
    "otlp_grpc": ("endpoint",),
    "jaeger_storage_exporter": ("trace_storage",),
    "jaeger_query": ("storage",),
    "otlp": ("protocols",),
}
_SERVICE: Final = {"extensions", "pipelines", "telemetry"}
_PIPELINE: Final = ("receivers", "processors", "exporters")


def problems(config: dict[str, Any]) -> list[str]:
    """What the collector would refuse, or would not do as it was meant."""
    return [*_keys(config), *_wiring(config), *_limits(config)]


def _keys(config: dict[str, Any]) -> Iterator[str]:
    for section, components in config.items():
        if section == "service":
            continue
        if section not in DOCUMENTED:
            yield f"{section}: no such section"
            continue
        for name, settings in components.items():
            kind = name.partition("/")[0]
            if kind not in DOCUMENTED[section]:
                yield f"{section}.{name}: no such component"
                continue
            yield from _unknown(settings or {}, DOCUMENTED[section][kind], f"{section}.{name}")
            for key in _REQUIRED.get(kind, ()):
                if key not in (settings or {}):
                    yield f"{section}.{name}.{key}: is missing"


def _unknown(settings: dict[str, Any], documented: dict[str, Any], path: str) -> Iterator[str]:
    for key, value in settings.items():
        known = documented.get(key, documented.get("<name>"))
        if known is None:
            yield f"{path}.{key}: no such key"
        elif isinstance(known, dict):
            if value is not None and not isinstance(value, dict):
                yield f"{path}.{key}: is {value!r} and no mapping"
            else:
                yield from _unknown(value or {}, known, f"{path}.{key}")
        elif not known[0](value):
            yield f"{path}.{key}: is {value!r} and not {known[1]}"


def _wiring(config: dict[str, Any]) -> Iterator[str]:
    service = config.get("service", {})
    for key in set(service) - _SERVICE:
        yield f"service.{key}: no such key"
    pipelines = service.get("pipelines") or {}
    if not pipelines:
        yield "service.pipelines: is missing"
    for name, pipeline in pipelines.items():
        yield from _pipeline(f"service.pipelines.{name}", pipeline)
    used = {key: {name for pipeline in pipelines.values() for name in pipeline.get(key, [])} for key in _PIPELINE}
    used["extensions"] = set(service.get("extensions", []))
    for section, names in used.items():
        defined = set(config.get(section) or {})
        yield from (f"{section}.{name}: is used and not defined" for name in sorted(names - defined))
        yield from (f"{section}.{name}: is defined and not used" for name in sorted(defined - names))
    for name, exporter in (config.get("exporters") or {}).items():
        storage = (exporter or {}).get("sending_queue", {}).get("storage")
        if storage and storage not in used["extensions"]:
            yield f"exporters.{name}: its queue is stored in {storage}, which is no extension in use"
    yield from _jaeger(config)


def _pipeline(path: str, pipeline: dict[str, list[str]]) -> Iterator[str]:
    if path.rpartition(".")[2].partition("/")[0] not in ("traces", "metrics", "logs"):
        yield f"{path}: no such signal"
    for key in set(pipeline) - set(_PIPELINE):
        yield f"{path}.{key}: no such key"
    for key in ("receivers", "exporters"):
        if not pipeline.get(key):
            yield f"{path}.{key}: is missing"
    if "memory_limiter" in [name.partition("/")[0] for name in pipeline.get("processors", [])[1:]]:
        yield f"{path}: memory_limiter must be the first processor"


def _jaeger(config: dict[str, Any]) -> Iterator[str]:
    extensions, exporters = config.get("extensions") or {}, config.get("exporters") or {}
    stores = set(extensions.get("jaeger_storage", {}).get("backends", {}))
    wanted = {exporter["trace_storage"] for exporter in exporters.values() if "trace_storage" in (exporter or {})}
    wanted.update(extensions.get("jaeger_query", {}).get("storage", {}).values())
    yield from (f"jaeger_storage: there is no {name}" for name in sorted(wanted - stores))


def _limits(config: dict[str, Any]) -> Iterator[str]:
    for name, limiter in (config.get("processors") or {}).items():
        if name.partition("/")[0] == "memory_limiter":
            yield from _limiter(f"processors.{name}", limiter)
    for name, exporter in (config.get("exporters") or {}).items():
        queue = (exporter or {}).get("sending_queue", {})
        if "batch" in queue:
            yield from _batch(f"exporters.{name}", queue, queue["batch"] or {})


def _limiter(path: str, limiter: dict[str, Any]) -> Iterator[str]:
    for unit in ("mib", "percentage"):
        if limiter.get(f"spike_limit_{unit}", 0) >= limiter.get(f"limit_{unit}", 1 << 60):
            yield f"{path}: spike_limit_{unit} must be below limit_{unit}"
    if not limiter.get("limit_mib") and not limiter.get("limit_percentage"):
        yield f"{path}: has no limit"
    if limiter.get("check_interval") == "0s":
        yield f"{path}: never checks"


def _batch(path: str, queue: dict[str, Any], batch: dict[str, Any]) -> Iterator[str]:
    sizer = batch.get("sizer", queue.get("sizer", "items"))
    smallest = batch.get("min_size", 8192)
    if sizer == "requests":
        yield f"{path}: a batch is measured in items or bytes"
    if batch.get("max_size", 0) and batch["max_size"] < smallest:
        yield f"{path}: max_size is below min_size"
    if sizer == queue.get("sizer") and smallest > queue.get("queue_size", 1000):
        yield f"{path}: the queue can't hold one batch"
