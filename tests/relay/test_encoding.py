"""What leaves is, byte for byte, what the SDK's own encoder would make of the same spans."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.util import BoundedList
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState

from otel_npu import semconv
from otel_npu.relay.encoding import SharedAttributes, encode_request, encode_span
from otel_npu.relay.links import Links
from otel_npu.relay.own_span import OwnSpan

SCOPE = InstrumentationScope("otel_npu", "1.2.3", "https://example.org/schema", {"built": True})
RESOURCE = Resource({"service.name": "vllm", "process.pid": 4711}, "https://example.org/resource")
TIMES = st.integers(0, (1 << 64) - 1)
INTEGERS = st.integers(-(1 << 63), (1 << 63) - 1)
TEXTS = st.text(st.characters(codec="utf-8"), max_size=200)
FLOATS = st.floats(allow_nan=False)
VALUES = st.one_of(
    *(TEXTS, st.booleans(), INTEGERS, FLOATS, st.lists(TEXTS), st.lists(INTEGERS), st.lists(FLOATS)), st.binary()
)
ATTRIBUTES = st.dictionaries(TEXTS, VALUES, max_size=6)
CONTEXTS = st.builds(
    SpanContext,
    st.integers(1, (1 << 128) - 1),
    st.integers(1, (1 << 64) - 1),
    st.booleans(),
    st.builds(TraceFlags, st.sampled_from((0, 1))),
    st.sampled_from((TraceState(), TraceState([("vendor", "value"), ("other", "1")]))),
)
STATUSES = st.one_of(
    st.sampled_from((Status(StatusCode.UNSET), Status(StatusCode.OK))),
    st.builds(lambda text: Status(StatusCode.ERROR, text), TEXTS),
)
SPANS = st.builds(
    ReadableSpan,
    TEXTS,
    CONTEXTS,
    st.none() | CONTEXTS,
    st.sampled_from((RESOURCE, Resource({"service.name": "other"}))),
    ATTRIBUTES,
    st.lists(st.builds(Event, TEXTS, ATTRIBUTES, TIMES), max_size=3),
    st.lists(st.builds(Link, CONTEXTS, ATTRIBUTES), max_size=3),
    st.sampled_from(SpanKind),
    status=STATUSES,
    start_time=TIMES,
    end_time=TIMES,
    instrumentation_scope=st.just(SCOPE),
)


def encoded(*spans: ReadableSpan) -> ExportTraceServiceRequest:
    request: ExportTraceServiceRequest = ExportTraceServiceRequest.FromString(encode_request(spans))
    return request


def span(**changes: Any) -> ReadableSpan:
    context = SpanContext(1, 2, is_remote=False)
    made: dict[str, Any] = {"name": "forward", "context": context, "resource": RESOURCE, "start_time": 3, "end_time": 4}
    return ReadableSpan(**{**made, "instrumentation_scope": SCOPE, **changes})


def by_the_sdk(*spans: ReadableSpan) -> ExportTraceServiceRequest:
    """What the SDK makes of them, and what its older versions leave out."""
    request = encode_spans(spans)
    for resource_spans in request.resource_spans:
        for scope_spans in resource_spans.scope_spans:
            scope_spans.schema_url = "https://example.org/schema"
            del scope_spans.scope.attributes[:]
            scope_spans.scope.attributes.add(key="built").value.bool_value = True
    return request


def pairs(**changes: Any) -> Any:
    """The attributes of such a span, as they arrive."""
    return encoded(span(**changes)).resource_spans[0].scope_spans[0].spans[0].attributes


@settings(max_examples=60)
@given(st.lists(SPANS, min_size=1, max_size=3))
def test_any_spans_are_what_the_sdk_makes_of_them(spans: list[ReadableSpan]) -> None:
    assert encoded(*spans) == by_the_sdk(*spans)


SHARED = SharedAttributes({"npu.rank": 1, "npu.host.duration": 0.25})
LINKS = st.builds(lambda ids: b"".join(ids) + b"\1", st.tuples(*[st.binary(min_size=8, max_size=8).filter(any)] * 3))
IDS = st.binary(min_size=8, max_size=8).filter(any)


@st.composite
def own_spans(draw: st.DrawFn) -> OwnSpan:
    """A span as the relay makes it."""
    ids = draw(IDS) + draw(IDS), draw(IDS), draw(st.just(b"") | IDS)
    attributes = draw(st.just(SHARED) | ATTRIBUTES)
    own = OwnSpan(draw(st.just("forward") | TEXTS), ids, RESOURCE, attributes, draw(st.integers(0, 1)), draw(TIMES))
    own._links = Links(draw(st.integers(0, 2)), draw(st.lists(LINKS, max_size=4)))
    own._events = draw(st.lists(st.builds(Event, TEXTS, ATTRIBUTES, TIMES), max_size=1))
    if draw(st.booleans()):
        own.failed("ValueError", draw(TEXTS))
    return own


@settings(max_examples=30)
@given(st.lists(own_spans(), min_size=1, max_size=3))
def test_our_own_are_what_the_sdk_makes_of_them_too(spans: list[OwnSpan]) -> None:
    ours, sdks = encoded(*spans), encode_spans(spans)
    for resource_spans in sdks.resource_spans:
        for scope_spans in resource_spans.scope_spans:
            scope_spans.schema_url = semconv.SCHEMA_URL
    assert ours == sdks


def test_our_own_is_one_of_the_sdks_for_whoever_takes_those() -> None:
    own = OwnSpan("forward", (b"t" * 16, b"s" * 8, b"p" * 8), RESOURCE, {"npu.rank": 1}, 1, 2)
    shown = json.loads(own.to_json())
    assert shown["context"]["trace_id"] == "0x" + (b"t" * 16).hex()
    assert shown["context"]["span_id"] == "0x" + (b"s" * 8).hex()
    assert shown["parent_id"] == "0x" + (b"p" * 8).hex()
    assert shown["status"] == {"status_code": "UNSET"}
    assert OwnSpan("root", (b"t" * 16, b"s" * 8, b""), RESOURCE, {}, 1, 2).parent is None


ALIKE = st.builds(
    ReadableSpan,
    st.sampled_from(("forward", "sample")),
    CONTEXTS,
    st.none() | CONTEXTS,
    st.just(RESOURCE),
    st.just(SHARED),
    st.lists(st.builds(Event, TEXTS, ATTRIBUTES, TIMES), max_size=1),
    st.lists(st.builds(Link, CONTEXTS, ATTRIBUTES), max_size=1),
    start_time=st.integers(0, 2),
    end_time=st.just(3),
    instrumentation_scope=st.just(SCOPE),
)


@settings(max_examples=60)
@given(st.lists(ALIKE, min_size=1, max_size=8))
def test_spans_that_share_their_attributes_share_no_more_than_they_have_in_common(spans: list[ReadableSpan]) -> None:
    assert encoded(*spans) == by_the_sdk(*spans)


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(1, (1 << 128) - 1), st.integers(1, (1 << 64) - 1)), max_size=40))
def test_links_as_frames_have_them_are_what_the_objects_are(ids: list[tuple[int, int]]) -> None:
    raw = [trace.to_bytes(16, "big") + number.to_bytes(8, "big") + b"\1" for trace, number in ids]
    links = Links(30, raw)
    objects = [Link(SpanContext(*pair, is_remote=True, trace_flags=TraceFlags(1))) for pair in ids]
    bounded = BoundedList[Link].from_seq(30, objects)
    assert [link.context for link in links] == [link.context for link in bounded]
    assert (len(links), links.dropped) == (len(bounded), bounded.dropped)
    assert encoded(span(links=links)) == by_the_sdk(span(links=bounded))


def test_what_was_beyond_the_limits_is_counted() -> None:
    events = BoundedList[Event].from_seq(1, [Event("a", timestamp=1), Event("b", timestamp=2)])
    beyond = span(events=events)
    assert encoded(beyond) == by_the_sdk(beyond)
    assert encoded(beyond).resource_spans[0].scope_spans[0].spans[0].dropped_events_count == 1


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.0])
def test_any_float_keeps_its_bits(value: float) -> None:
    one = span(attributes={"x": value})
    assert encoded(one).SerializeToString() == by_the_sdk(one).SerializeToString()


def test_values_that_are_equal_but_not_of_one_kind_keep_their_kinds() -> None:
    for value, kind in ((1, "int_value"), (True, "bool_value"), (1.0, "double_value"), (1, "int_value")):
        [pair] = pairs(attributes={"x": value})
        assert pair.value.WhichOneof("value") == kind


@pytest.mark.parametrize(("count", "kept"), [(1 << 63, (1 << 63) - 1), (-(1 << 70), -(1 << 63))])
def test_a_count_that_leaves_its_range_stays_at_the_end_of_it(count: int, kept: int) -> None:
    [pair] = (
        encoded(span(attributes={"npu.dropped.queue_full": count})).resource_spans[0].scope_spans[0].spans[0].attributes
    )
    assert pair.value.int_value == kept


@pytest.mark.parametrize("changes", [{"start_time": -1}, {"end_time": 1 << 64}, {"attributes": {"x": object()}}])
def test_what_otlp_can_not_hold_is_an_error(changes: dict[str, Any]) -> None:
    with pytest.raises(Exception, match=r"range|argument|OTLP"):
        encode_span(span(**changes))


def test_more_different_texts_than_are_remembered_are_all_right() -> None:
    for number in range(10_000):
        half, text, count = pairs(attributes={f"key{number}": 0.5, "text": f"value {number}", "number": number})
        assert (half.key, half.value.double_value) == (f"key{number}", 0.5)
        assert (text.value.string_value, count.value.int_value) == (f"value {number}", number)
