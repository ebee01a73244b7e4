"""Frames become spans: what they say, where they lie, and that no span breaks causality."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.trace import SpanKind, StatusCode

from otel_npu import semconv
from otel_npu._version import __version__
from otel_npu.capture import context
from otel_npu.relay.assembler import Assembler
from otel_npu.relay.placing import nest
from otel_npu.relay.spans import span_limits
from otel_npu.relay.wall import WallClock
from otel_npu.wire import frames
from tests.helpers.built import hello, stage, step, unfinished

if TYPE_CHECKING:
    from collections.abc import Sequence

    from opentelemetry.sdk.trace import ReadableSpan, SpanLimits

UNIX_NS = 1_700_000_000_000_000_000  # Unix time when the host's monotonic clock is at 0
US, MS = 1_000, 1_000_000


def assembler(limits: SpanLimits | None = None, **changes: Any) -> Assembler:
    wall = WallClock(monotonic=lambda: 0, unix=lambda: UNIX_NS)
    return Assembler(hello(**changes), wall, span_limits if limits is None else lambda: limits)


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def times(span: ReadableSpan) -> tuple[int, int]:
    """Start and end on the host's monotonic clock."""
    assert span.start_time is not None
    assert span.end_time is not None
    return span.start_time - UNIX_NS, span.end_time - UNIX_NS


def duration_ns(span: ReadableSpan) -> int:
    start_ns, end_ns = times(span)
    return end_ns - start_ns


def span_id(span: ReadableSpan) -> int:
    assert span.context is not None
    return int(span.context.span_id)


def parent_id(span: ReadableSpan) -> int | None:
    return None if span.parent is None else int(span.parent.span_id)


# What spans say


def test_a_step_is_a_span_with_its_stages_below() -> None:
    inner = stage(name="attention", parent=0, entered_ns=1100, exited_ns=1200, device_ns=5100, duration_ns=200)
    forward, attention, worker = assembler().step(
        step(3, kind="prefill", parent_span_id=b"p" * 8, stages=[stage(), inner])
    )
    assert [span.name for span in (forward, attention, worker)] == ["forward", "attention", "worker_step"]
    assert span_id(worker) == int.from_bytes(b"s" * 8, "big")
    assert parent_id(worker) == int.from_bytes(b"p" * 8, "big")
    assert parent_id(forward) == span_id(worker)
    assert parent_id(attention) == span_id(forward)
    for span in (forward, attention, worker):
        assert span.context is not None
        assert span.context.trace_id == int.from_bytes(b"t" * 16, "big")
        assert span.kind is SpanKind.INTERNAL
        assert span.status.status_code is StatusCode.UNSET
        scope = span.instrumentation_scope
        assert scope is not None
        assert (scope.name, scope.version, scope.schema_url) == ("otel_npu", __version__, semconv.SCHEMA_URL)
    assert attributes(worker) == {
        "npu.timing": "device",
        "npu.sampled.reason": "rate",
        "npu.step.number": 3,
        "npu.step.kind": "prefill",
        "npu.step.stages": 2,
    }


def test_a_stage_says_how_it_was_timed_and_where_it_ran() -> None:
    on_device = stage(device_index=2, stream_id=5, entered_ns=1000, exited_ns=1500)
    on_host = stage(name="schedule", device_ns=None, entered_ns=100, exited_ns=350, duration_ns=250)
    device_timed, host_timed, _ = assembler().step(step(stages=[on_device, on_host]))
    said = attributes(device_timed)
    assert said["npu.timing"] == "device"
    assert (said["npu.device.index"], said["npu.stream.id"]) == (2, 5)
    assert said["npu.host.duration"] == 500e-9
    start_ns, end_ns = times(device_timed)
    assert said["npu.device.duration"] == (end_ns - start_ns) / 1e9
    assert said["npu.enqueue.delay"] == pytest.approx((times(device_timed)[0] - 1000) * 1e-9)
    assert said["npu.clock.uncertainty"] > 0
    assert attributes(host_timed) == {"npu.timing": "host", "npu.host.duration": pytest.approx(250e-9)}
    assert times(host_timed) == (100, 350)


def test_a_stage_that_the_host_timed_where_there_is_a_device_says_so_in_its_name() -> None:
    stages = [stage(), stage(name="bookkeep", device_ns=None)]
    assert [span.name for span in assembler().step(step(stages=stages))] == [
        "forward",
        "bookkeep (host)",
        "worker_step",
    ]
    on_the_cpu = assembler(device_kind="cpu").step(step(stages=[stage(device_ns=None)]))
    assert [span.name for span in on_the_cpu] == ["forward", "worker_step"]


def test_ranks_are_told_apart_by_the_names_of_their_steps() -> None:
    [alone] = assembler().step(step(rank=0, stages=[], attributes={"npu.step.ranks": 1}))
    [other] = assembler().step(step(rank=1, stages=[], attributes={"npu.step.ranks": 2}))
    assert (alone.name, other.name) == ("worker_step", "worker_step rank 1")


def test_what_is_true_of_all_steps_of_a_rank_is_on_each_of_them() -> None:
    relay = assembler(places={0: {semconv.TP_RANK: 7, semconv.DP_RANK: 3}, 1: {semconv.TP_RANK: 8}})
    *_, first = relay.step(step(1, rank=0))
    *_, second = relay.step(step(2, rank=1, attributes={semconv.GRAPH_MODE: "full"}))
    *_, other = relay.step(step(3))
    assert [attributes(span).get(semconv.TP_RANK) for span in (first, second, other)] == [7, 8, None]
    assert attributes(first)[semconv.DP_RANK] == 3
    assert attributes(second)[semconv.GRAPH_MODE] == "full"


def test_what_the_program_says_never_hides_what_was_measured() -> None:
    [span, _] = assembler().step(step(stages=[stage(attributes={"npu.timing": "guessed", "tokens": 7})]))
    assert attributes(span)["npu.timing"] == "device"
    assert attributes(span)["tokens"] == 7


def test_errors_mark_the_spans_that_they_left() -> None:
    failed, worker = assembler().step(step(error="ValueError", stages=[stage(error="KeyError")]))
    assert (failed.status.status_code, attributes(failed)["error.type"]) == (StatusCode.ERROR, "KeyError")
    assert (worker.status.status_code, attributes(worker)["error.type"]) == (StatusCode.ERROR, "ValueError")


def test_a_stage_outside_of_any_step_has_no_step_span() -> None:
    links = [b"l" * frames.LINK_BYTES]
    outer, inner = assembler().step(
        step(bare=True, stages=[stage(), stage(parent=0)], links=links, parent_span_id=b"p" * 8)
    )
    assert parent_id(outer) == int.from_bytes(b"p" * 8, "big")
    assert parent_id(inner) == span_id(outer)
    assert (len(outer.links), len(inner.links)) == (1, 0)


def test_a_step_that_is_not_kept_is_no_span_but_teaches_the_clock() -> None:
    spans = assembler()
    unkept = stage(entered_ns=1000, exited_ns=1010, device_ns=1000, duration_ns=10)
    assert not spans.step(step(trace_id=b"", span_id=b"", stages=[unkept], seen_ns=1100))
    [placed, _] = spans.step(step(stages=[stage(entered_ns=900, exited_ns=910, device_ns=2000, duration_ns=10)]))
    # From the unkept step alone it is known that the device's clock is at most 90 ns behind the host's.
    assert times(placed)[0] <= 2000 + 90


def test_a_stage_that_hangs_ends_now_and_says_so() -> None:
    span = assembler().unfinished(unfinished(entered_ns=5 * MS, now_ns=35 * MS))
    assert times(span) == (5 * MS, 35 * MS)
    assert span.status.status_code is StatusCode.ERROR
    assert attributes(span)["npu.stage.name"] == "forward"
    assert attributes(span)["npu.step.number"] == 7
    assert parent_id(span) == int.from_bytes(b"s" * 8, "big")


def test_a_stage_lies_in_the_innermost_that_was_entered_before_and_exited_after() -> None:
    given = [(0, 100), (10, 50), (20, 30), (40, 60), (60, 90), (100, 110)]
    stages = [stage(entered_ns=entered_ns, exited_ns=exited_ns, parent=77) for entered_ns, exited_ns in given]
    nest(stages)
    assert [one.parent for one in stages] == [-1, 0, 1, 0, 0, -1]


def test_drops_are_said_once_by_the_next_step_span() -> None:
    spans = assembler()
    spans.count_drops({"queue_full": 2})
    spans.step(step(1, trace_id=b"", span_id=b"", dropped={"pool_exhausted": 3}))
    spans.step(step(2, bare=True))
    told = attributes(spans.step(step(3, dropped={"pool_exhausted": 1}))[-1])
    assert (told["npu.dropped.pool_exhausted"], told["npu.dropped.queue_full"]) == (4, 2)
    assert not [key for key in attributes(spans.step(step(4))[-1]) if key.startswith("npu.dropped")]


def test_ids_do_not_repeat_over_20000_spans_although_the_program_seeds_its_randomness() -> None:
    spans = assembler()
    made: list[ReadableSpan] = []
    for _ in range(200):
        random.seed(0)
        trace_id, own_id, _parent, _kept = context.new_root()
        frame = step(trace_id=trace_id, span_id=own_id, stages=[stage() for _ in range(99)])
        made += spans.step(frame)
    assert len({span_id(span) for span in made}) == len(made) == 20_000
    assert len({span.context.trace_id for span in made if span.context}) == 200


# Limits


def a_batch(requests: int) -> list[bytes]:
    return [n.to_bytes(16, "big") + n.to_bytes(8, "big") + b"\x01" for n in range(1, requests + 1)]


def on_the_wire(spans: Sequence[ReadableSpan]) -> Any:
    """The last of the spans as OTLP has it."""
    return encode_spans(spans).resource_spans[0].scope_spans[0].spans[-1]


def test_a_batch_of_1000_requests_keeps_all_its_links() -> None:
    sent = on_the_wire(assembler().step(step(links=a_batch(1000))))
    assert [int.from_bytes(link.trace_id, "big") for link in sent.links] == list(range(1, 1001))
    assert sent.dropped_links_count == 0


def test_the_largest_batch_whose_links_fit_into_a_frame_keeps_them() -> None:
    links = a_batch(4096)
    assert len(frames.encode(step(links=links))) < frames.MAX_FRAME_BYTES
    assert on_the_wire(assembler().step(step(links=links))).dropped_links_count == 0


def test_the_standard_limit_of_links_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SPAN_LINK_COUNT_LIMIT", "10")
    sent = on_the_wire(assembler().step(step(links=a_batch(1000))))
    assert (len(sent.links), sent.dropped_links_count) == (10, 990)


def test_the_standard_limits_of_attributes_are_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", "6")
    monkeypatch.setenv("OTEL_SPAN_ATTRIBUTE_VALUE_LENGTH_LIMIT", "3")
    given = {f"key{n}": "value" for n in range(8)}
    sent = on_the_wire(assembler().step(step(attributes=given)))
    values = {pair.key: pair.value for pair in sent.attributes}
    assert (len(values), sent.dropped_attributes_count) == (6, 7)
    assert values["key7"].string_value == "val"
    assert "npu.step.number" in values  # what was measured stays


@pytest.mark.parametrize("value", ["many", "-1", "1.5"])
def test_a_limit_that_is_no_number_is_one_clear_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, value: str
) -> None:
    monkeypatch.setenv("OTEL_SPAN_LINK_COUNT_LIMIT", value)
    assert span_limits().max_links == 4096
    [record] = caplog.records
    assert f"OTEL_SPAN_LINK_COUNT_LIMIT={value!r}: takes a whole number, 0 or more" in record.getMessage()


def test_each_link_keeps_its_flags() -> None:
    ids = b"t" * 16 + b"s" * 8
    worker = assembler().step(step(links=[ids + b"\x01", ids + b"\x00"]))[-1]
    assert [link.context.trace_flags for link in worker.links] == [1, 0]


# Where spans lie


def test_a_step_reaches_from_its_first_stage_to_its_last_on_the_device() -> None:
    first = stage(entered_ns=1000, exited_ns=1100, device_ns=501_000, duration_ns=2000)
    last = stage(name="sample", entered_ns=1200, exited_ns=1300, device_ns=504_000, duration_ns=3000)
    spans = assembler().step(step(stages=[first, last], opened_ns=900, closed_ns=1400, seen_ns=9000))
    assert times(spans[-1]) == (times(spans[0])[0], times(spans[1])[1])
    assert duration_ns(spans[-1]) == pytest.approx(6000, abs=20)  # across stages by the clocks' rates


def test_a_step_without_stages_has_the_hosts_times() -> None:
    [span] = assembler().step(step(stages=[], opened_ns=900, closed_ns=1400))
    assert times(span) == (900, 1400)


def test_a_device_that_has_never_been_seen_done_is_placed_by_its_enqueueing() -> None:
    [placed, _] = assembler().step(step(stages=[stage(entered_ns=1000, exited_ns=1500, duration_ns=900)]))
    start_ns, end_ns = times(placed)
    assert (start_ns >= 1000, end_ns >= 1500, duration_ns(placed)) == (True, True, 900)


def test_devices_have_clocks_of_their_own() -> None:
    one = stage(device_index=0, device_ns=5_000_000, duration_ns=700)
    other = stage(device_index=1, device_ns=10**15, duration_ns=300)
    spans = assembler().step(step(stages=[one, other], seen_ns=4000))
    assert [duration_ns(span) for span in spans[:2]] == [700, 300]
    for span in spans[:2]:
        start_ns, end_ns = times(span)
        assert start_ns >= 1000
        assert end_ns <= 4000


@dataclass
class Work:
    """A stage to be, and what happens in it: host time passes, a kernel is launched, stages inside run."""

    before_ns: int
    kernel_ns: int
    after_ns: int
    stream: int = 0
    device: int = 0
    on_host: bool = False
    inside: list[Work] = field(default_factory=list)


@dataclass
class Host:
    """Runs work on devices that are in order on each stream, and notes what a traced process would."""

    offsets_ns: tuple[int, int]
    drift: float
    now_ns: int = 10**12
    busy_until_ns: dict[tuple[int, int], int] = field(default_factory=dict)
    stages: list[frames.Stage] = field(default_factory=list)

    def run(self, works: list[Work], look_after_ns: int, number: int = 1) -> frames.Step:
        opened_ns = self.now_ns
        self.stages = []
        for work in works:
            self._do(work, -1)
        closed_ns = self.now_ns
        self.now_ns = seen_ns = max(closed_ns, *self.busy_until_ns.values(), 0) + look_after_ns
        return step(number, opened_ns=opened_ns, closed_ns=closed_ns, seen_ns=seen_ns, stages=self.stages)

    def _do(self, work: Work, parent: int) -> None:
        index, stream = len(self.stages), (work.device, work.stream)
        entered_ns = self.now_ns
        start_ns = self._event(stream)
        self.stages.append(stage())
        self.now_ns += work.before_ns
        for inside in work.inside:
            self._do(inside, index)
        self.busy_until_ns[stream] = max(self.busy_until_ns.get(stream, 0), self.now_ns) + work.kernel_ns
        self.now_ns += work.after_ns
        exited_ns = self.now_ns
        device_ns = self._device_time(work.device, start_ns)
        taken_ns = self._device_time(work.device, self._event(stream)) - device_ns
        self.stages[index] = stage(
            name=str(index),
            parent=parent,
            entered_ns=entered_ns,
            exited_ns=exited_ns,
            device_ns=None if work.on_host else device_ns,
            duration_ns=exited_ns - entered_ns if work.on_host else taken_ns,
            device_index=work.device,
            stream_id=work.stream,
        )

    def _event(self, stream: tuple[int, int]) -> int:
        reached_ns = self.busy_until_ns[stream] = max(self.busy_until_ns.get(stream, 0), self.now_ns)
        return reached_ns

    def true_time(self, device_ns: int) -> int:
        """The host time of the first device's time."""
        return round((device_ns - 10**12 - self.offsets_ns[0]) / (1 + self.drift)) + 10**12

    def _device_time(self, device: int, host_ns: int) -> int:
        return host_ns + self.offsets_ns[device] + round((host_ns - 10**12) * self.drift)


spans_of_time = st.one_of(st.integers(0, 5 * US), st.integers(0, 20 * MS))
ways = st.lists(
    st.recursive(
        st.builds(Work, spans_of_time, spans_of_time, spans_of_time),
        lambda inside: st.builds(
            Work, spans_of_time, spans_of_time, spans_of_time, inside=st.lists(inside, max_size=3)
        ),
        max_leaves=8,
    ),
    min_size=1,
    max_size=4,
)
mixed_ways = st.lists(
    st.recursive(
        st.builds(
            Work,
            spans_of_time,
            spans_of_time,
            spans_of_time,
            stream=st.integers(0, 1),
            device=st.integers(0, 1),
            on_host=st.booleans(),
        ),
        lambda inside: st.builds(
            Work,
            spans_of_time,
            spans_of_time,
            spans_of_time,
            stream=st.integers(0, 1),
            device=st.integers(0, 1),
            on_host=st.booleans(),
            inside=st.lists(inside, max_size=3),
        ),
        max_leaves=8,
    ),
    min_size=1,
    max_size=4,
)
hosts = st.builds(
    Host,
    st.tuples(st.integers(-(10**11), 10**15), st.integers(-(10**11), 10**15)),
    st.floats(-100e-6, 100e-6),
)


def check_causality(frame: frames.Step, spans: Sequence[ReadableSpan]) -> None:
    *stages, worker = spans
    for given_stage, span in zip(frame.stages, stages, strict=True):
        start_ns, end_ns = times(span)
        around = worker if given_stage.parent < 0 else stages[given_stage.parent]
        assert parent_id(span) == span_id(around)
        assert times(worker)[0] <= start_ns <= end_ns <= times(worker)[1]
        assert start_ns >= given_stage.entered_ns
        assert end_ns - start_ns == given_stage.duration_ns
        if given_stage.parent >= 0 and place_of(given_stage) == place_of(frame.stages[given_stage.parent]):
            # On another stream or clock it may truly reach beyond.
            assert times(around)[0] <= start_ns
            assert end_ns <= times(around)[1]


def place_of(given_stage: frames.Stage) -> tuple[int, int, bool]:
    return given_stage.device_index, given_stage.stream_id, given_stage.device_ns is None


@pytest.mark.slow
@given(hosts, st.lists(st.tuples(mixed_ways, st.integers(0, 3 * MS)), min_size=1, max_size=4))
def test_no_span_breaks_causality(host: Host, steps: list[tuple[list[Work], int]]) -> None:
    """Any nesting, two streams on each of two devices, and stages that only the host times."""
    host = replace(host, busy_until_ns={}, stages=[])
    spans = assembler()
    for works, look_after_ns in steps:
        frame = host.run(works, look_after_ns)
        check_causality(frame, spans.step(frame))


@pytest.mark.slow
@given(hosts, st.lists(st.tuples(ways, st.integers(0, 3 * MS)), min_size=1, max_size=4))
def test_on_one_stream_each_span_is_where_it_was_within_its_uncertainty(
    host: Host, steps: list[tuple[list[Work], int]]
) -> None:
    host = replace(host, busy_until_ns={}, stages=[])
    spans = assembler()
    for works, look_after_ns in steps:
        frame = host.run(works, look_after_ns)
        made = spans.step(frame)
        check_causality(frame, made)
        # What lies in a stage keeps its distance from it, by the device's clock.
        length_ns = times(made[-1])[1] - times(made[-1])[0]
        for given_stage, span in zip(frame.stages, made[:-1], strict=True):
            assert given_stage.device_ns is not None
            true_ns = host.true_time(given_stage.device_ns)
            uncertainty_ns = attributes(span)["npu.clock.uncertainty"] * 1e9
            assert abs(times(span)[0] - true_ns) <= uncertainty_ns + length_ns * 2 * abs(host.drift) + 5
