"""What an outage of the receiver costs: spans lost, seconds until they come again, memory and time of the relay.

    python -m benchmarks.outage --seconds 60                     the receiver is down
    python -m benchmarks.outage --seconds 60 --throttled 30      it answers RESOURCE_EXHAUSTED, with RetryInfo
    python -m benchmarks.outage --seconds 60 --links 1000        every step links to a thousand requests
    python -m benchmarks.outage --seconds 60 --rate 5000 --queue-bytes 2000000         more than fits

A program makes steps of five stages at an even rate, all of them kept. At the end every span has to be either at the
receiver, once or more often, or in a count of the spans that arrived.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from tests.helpers.traced import relays

BEFORE_SECONDS = 5
AFTER_SECONDS = 20
SPANS_A_STEP = 6

PROGRAM = """\
import os, random, sys, time
import otel_npu

rate, links, seconds = (float(argument) for argument in sys.argv[1:])
def request():
    return f"00-{random.getrandbits(128):032x}-{random.getrandbits(64):016x}-01"
requests = [request() for _ in range(int(links))]
began = time.monotonic()
made = 0
while (now := time.monotonic() - began) < seconds:
    while made < now * rate / 6:
        if requests:
            requests[random.randrange(len(requests))] = request()
        with otel_npu.step("decode", requests=requests):
            for name in ("prepare_input", "forward", "post_process", "sample", "bookkeep"):
                with otel_npu.stage(name):
                    pass
        made += 1
    time.sleep(0.005)
print("all exported" if otel_npu.flush(60) else "not all exported", flush=True)
with otel_npu.step("last"):
    pass
otel_npu.flush(60)
print(6 * made + 1, flush=True)
"""


class Receiver(trace_service_pb2_grpc.TraceServiceServicer):
    """Counts spans, and when they came; it can be taken away, and it can ask for patience."""

    def __init__(self) -> None:
        self.ids: set[bytes] = set()
        self.dropped: dict[str, int] = {}
        self.first_arrival = 0.0
        self.retry_seconds: float | None = None
        self._lock = threading.Lock()
        self.port = 0
        self.start()

    def start(self) -> None:
        """Listen, on the same port as before."""
        self._server = grpc.server(futures.ThreadPoolExecutor(4), options=[("grpc.so_reuseport", 0)])
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)  # type: ignore[no-untyped-call]
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        self._server.start()

    def stop(self) -> None:
        """Be gone."""
        self._server.stop(grace=None).wait()

    def Export(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Take the spans, unless they are to come later."""
        if self.retry_seconds is not None:
            info = any_pb2.Any()
            info.Pack(RetryInfo(retry_delay=duration_pb2.Duration(seconds=int(self.retry_seconds))))
            status = Status(code=8, message="slow down", details=[info])
            context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "slow down")
        with self._lock:
            self.first_arrival = self.first_arrival or time.monotonic()
            for resource_spans in request.resource_spans:
                for scope_spans in resource_spans.scope_spans:
                    for span in scope_spans.spans:
                        if span.span_id not in self.ids:
                            self.ids.add(span.span_id)
                            self._count_drops(span)
        return trace_service_pb2.ExportTraceServiceResponse()

    def _count_drops(self, span: Any) -> None:
        for pair in span.attributes:
            if pair.key.startswith("npu.dropped."):
                self.dropped[pair.key] = self.dropped.get(pair.key, 0) + pair.value.int_value


class Watch(threading.Thread):
    """Looks at a process until it ends: how much memory it has at most, and how long it runs."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._process = Path(f"/proc/{pid}")
        self.first_mb = self.most_mb = self.cpu_seconds = 0.0
        self.start()

    def run(self) -> None:
        """Look."""
        while True:
            try:
                pages = int((self._process / "statm").read_text().split()[1])
                times = (self._process / "stat").read_text().rpartition(")")[2].split()[11:13]
            except (OSError, IndexError):
                return
            megabytes = pages * os.sysconf("SC_PAGE_SIZE") / 1e6
            self.first_mb = self.first_mb or megabytes
            self.most_mb = max(self.most_mb, megabytes)
            self.cpu_seconds = sum(map(int, times)) / os.sysconf("SC_CLK_TCK")
            time.sleep(0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="how long the outage is")
    parser.add_argument("--rate", type=float, default=1200, help="spans a second")
    parser.add_argument("--links", type=int, default=0, help="requests that each step is linked to")
    parser.add_argument("--queue-bytes", default="64000000", help="OTEL_NPU_QUEUE_BYTES")
    parser.add_argument("--throttled", type=float, help="the receiver answers, and asks to come again after so long")
    chosen = parser.parse_args()
    receiver = Receiver()
    folder = Path(tempfile.mkdtemp())
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("OTEL_")},
        "OTEL_NPU_ENABLED": "1",
        "OTEL_NPU_DEVICE": "cpu",
        "OTEL_NPU_STEPS_PER_SECOND": "all",
        "XDG_RUNTIME_DIR": str(folder),
        "OTEL_NPU_QUEUE_BYTES": chosen.queue_bytes,
        "OTEL_METRICS_EXPORTER": "none",
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{receiver.port}",
    }
    seconds = BEFORE_SECONDS + chosen.seconds + AFTER_SECONDS
    arguments = [sys.executable, "-c", PROGRAM, str(chosen.rate), str(chosen.links), str(seconds)]
    program = subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, text=True)  # noqa: S603
    assert program.stdout is not None
    time.sleep(BEFORE_SECONDS)
    [relay] = relays(folder)
    watch = Watch(relay)
    if chosen.throttled is None:
        receiver.stop()
    receiver.retry_seconds = chosen.throttled
    time.sleep(chosen.seconds)
    receiver.first_arrival, receiver.retry_seconds = 0.0, None
    if chosen.throttled is None:
        receiver.start()
    back = time.monotonic()
    for line in program.stdout:
        print(line.rstrip())
        made = line.strip()
    program.wait()
    watch.join()
    lost = {reason: count for reason, count in receiver.dropped.items() if not reason.endswith("ping_unanswered")}
    missing = int(made) - len(receiver.ids)
    print(f"made {made} spans, arrived {len(receiver.ids)}, missing {missing}; counted: {lost or 'nothing'}")
    print(f"spans again {receiver.first_arrival - back:.1f} s after the receiver's return")
    microseconds = watch.cpu_seconds / int(made) * 1e6
    print(f"relay: {watch.first_mb:.0f} MB before, {watch.most_mb:.0f} MB at most, {microseconds:.0f} us a span")


if __name__ == "__main__":
    main()
