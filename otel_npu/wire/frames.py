"""The frames: msgpack arrays, one a packet, told apart by their first element.

Times are nanoseconds: `*_ns` of the host's monotonic clock, `device_ns` of the device's own. Ids are raw bytes.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeAlias

import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable

PROTOCOL: Final = 5
MAX_STAGES: Final = 1024  # of one step
MAX_FRAME_BYTES: Final = 128 * 1024  # with what the kernel adds it fits a stock socket buffer of 208 KiB

# Checked by whoever decodes, at no cost to whoever sends: one value that OTLP can't hold fails a whole export.
MAX_NANOSECONDS: Final = 1 << 62
Nanoseconds: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=MAX_NANOSECONDS)]
DeviceNanoseconds: TypeAlias = Annotated[int, msgspec.Meta(ge=-MAX_NANOSECONDS, le=MAX_NANOSECONDS)]
Integer: TypeAlias = Annotated[int, msgspec.Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]
Positive: TypeAlias = Annotated[int, msgspec.Meta(ge=1, le=1 << 31)]
Rank: TypeAlias = Annotated[int, msgspec.Meta(ge=-1, le=1 << 31)]

Scalar: TypeAlias = str | bool | Integer | float
AttributeValue: TypeAlias = Scalar | list[Scalar]
Attributes: TypeAlias = dict[str, AttributeValue]


class Hello(msgspec.Struct, array_like=True, tag="hello", frozen=True):
    """The first frame of a connection: which process this is.

    The service's name and attributes travel as the environment gives them; the relay makes of them what the
    process's own SDK would.
    """

    protocol: int
    pid: Count
    host: str
    instance_id: str
    executable: str
    service_name: str
    resource_attributes: str
    device_kind: str
    device_name: str
    device_resolution_ns: Nanoseconds
    slow_step: float = math.inf
    """How many times the usual a step of its own, one of no engine, takes at least to be kept for it."""
    on: bool = True
    """Whether it captures."""
    places: dict[int, Attributes] = {}
    """By a worker's rank in its engine what is true of all its steps: it is not said again with each."""


class Stage(msgspec.Struct, array_like=True):
    """One stage of a step. `parent` is the index of the stage around it in the step, or -1.

    It is worked out by whoever places the step, from when the stages were entered and exited (`relay.placing.nest`).
    """

    name: str
    parent: int
    entered_ns: Nanoseconds
    exited_ns: Nanoseconds
    device_ns: DeviceNanoseconds | None
    duration_ns: Nanoseconds
    device_index: Integer
    stream_id: Integer
    error: str | None
    attributes: Attributes | None


class Step(msgspec.Struct, array_like=True, tag="step", frozen=True, weakref=True):
    """A step that is done, with all its stages in the order in which they were entered.

    `kept` says whether it was chosen to be a trace when it began; one that was not has its ids all the same, because
    it may turn out to be slow. Without a trace id it never becomes one. `parent_span_id` is there also when the step
    belongs to an engine's step: it is what the two are joined by. `bare` marks a stage that ran in no
    step: it has no step span. `rank` is the worker's in its engine, -1 where there are no ranks; `returns_output`
    marks the rank whose output the engine waits for. `dropped` counts what the process left out since its last
    frame, by reason.
    """

    trace_id: bytes
    span_id: bytes
    parent_span_id: bytes
    bare: bool
    rank: Rank
    returns_output: bool
    number: Count
    kind: str
    opened_ns: Nanoseconds
    closed_ns: Nanoseconds
    seen_ns: Nanoseconds
    error: str | None
    attributes: Attributes | None
    links: list[bytes]
    dropped: dict[str, Count]
    stages: Annotated[list[Stage], msgspec.Meta(max_length=MAX_STAGES)]
    kept: bool = True


class Ping(msgspec.Struct, array_like=True, tag="ping", frozen=True):
    """A look at a device's clock: it showed `device_ns` between two instants of the host's."""

    device_index: Integer
    device_ns: DeviceNanoseconds
    before_ns: Nanoseconds
    seen_ns: Nanoseconds


class Unfinished(msgspec.Struct, array_like=True, tag="unfinished", frozen=True):
    """A stage that hangs: sent once, while it does. Without a trace id it is only counted.

    `parent_span_id` is what its span lies in, `span_id` the step, and `engine_span_id` the engine's step around that,
    if there is one: both are kept as traces if they come to an end.
    """

    trace_id: bytes
    parent_span_id: bytes
    step_number: Count
    step_kind: str
    name: str
    entered_ns: Nanoseconds
    now_ns: Nanoseconds
    device_index: Integer
    rank: Rank = -1
    span_id: bytes = b""
    engine_span_id: bytes = b""


class Request(msgspec.Struct, array_like=True, tag="request", frozen=True, weakref=True):
    """A request has reached an engine; sent once, by the engine, before the first step that serves it.

    `key` names the request in the frames of other processes; `number` does so in those of this connection. The spans
    of the request become children of `parent_span_id`: vLLM's own `llm_request` if it traces, else the caller's.
    `response_id` is what its client knows it by. With `detail` every step of it is wanted, not the slowest alone.
    """

    key: bytes
    number: Count
    trace_id: bytes
    parent_span_id: bytes
    request_id: str
    arrived_unix_ns: Nanoseconds
    response_id: str = ""
    detail: bool = False


class Scheduled(msgspec.Struct, array_like=True, tag="scheduled", frozen=True, weakref=True):
    """An engine has scheduled a step. `kept` says whether it was chosen to be a trace; without a trace id it never is.

    `requests`, `tokens` and `prefills` go together: of each sampled request in the step its number, how many tokens
    were scheduled for it, and whether they are of its prompt. `total_tokens` and `total_requests` count the others
    too. `preempted` were put back into the queue by this scheduling. `ended` have left the engine since the frame
    before, without an output that said so: they were aborted.

    `first`, `cached` and `fetched` go together: of each sampled request that was never scheduled before, how many
    tokens of its prompt the engine's own cache had, and how many came from elsewhere; the totals count the others too.
    `pipeline` is how many stages the ranks are in.

    `like` is the span id of a step before with the same `requests`, `tokens` and `prefills`, which are not listed again
    then.
    """

    trace_id: bytes
    span_id: bytes
    number: Count
    kind: str
    opened_ns: Nanoseconds
    scheduled_ns: Nanoseconds
    ranks: Count
    total_tokens: Count
    total_requests: Count
    requests: list[Count]
    tokens: list[Count]
    prefills: list[bool]
    preempted: list[Count]
    ended: list[Count]
    dropped: dict[str, Count]
    kept: bool = True
    pipeline: Positive = 1
    first: list[Count] = []
    cached: list[Count] = []
    fetched: list[Count] = []
    total_cached: Count = 0
    total_fetched: Count = 0
    like: bytes = b""


class Updated(msgspec.Struct, array_like=True, tag="updated", frozen=True):
    """An engine has taken in the output of a step, named by its span id.

    `requests` and `new_tokens` go together: how many tokens the step gave each sampled request that has an output.
    `finished` are those whose last output this was, as far as the engine knows. `keep` says why the step is kept
    after all, if it is. Of a step that verified drafts `drafted` and `accepted` have the tokens of each of `requests`,
    else nothing; the totals count all requests. Where all that were scheduled were given as many tokens and none is
    finished, `each` says how many, and none is listed.
    """

    span_id: bytes
    closed_ns: Nanoseconds
    requests: list[Count]
    new_tokens: list[Count]
    finished: list[Count]
    keep: str = ""
    drafted: list[Count] = []
    accepted: list[Count] = []
    total_drafted: Count = 0
    total_accepted: Count = 0
    each: Count = 0


class Transfers(msgspec.Struct, array_like=True, tag="transfers", frozen=True):
    """KV cache of an engine's requests is on its way from elsewhere, or to elsewhere, or has arrived there.

    `loading` and `tokens` go together: requests that wait from now on for so many tokens. `loaded` wait no more.
    `failed` have to compute what did not come. The blocks of `sending` are kept although the request is over, and
    those of `sent` are free.
    """

    connector: str
    at_ns: Nanoseconds
    loading: list[Count] = []
    tokens: list[Count] = []
    loaded: list[Count] = []
    failed: list[Count] = []
    sending: list[Count] = []
    sent: list[Count] = []


class Keep(msgspec.Struct, array_like=True, tag="keep", frozen=True):
    """Steps of an engine that are kept after all, by their span ids, and why.

    Its workers pass it on: their relay may be another than the engine's.
    """

    reason: str
    span_ids: list[bytes]


class RequestEnd(msgspec.Struct, array_like=True, tag="request_end", frozen=True, weakref=True):
    """The front end is done with a request: after so many output tokens, for this reason (`stop`, `abort`, ...).

    `dropped` counts what the process left out since its last frame with counts.
    """

    key: bytes
    ended_unix_ns: Nanoseconds
    output_tokens: Count
    reason: str
    dropped: dict[str, Count]


class Flush(msgspec.Struct, array_like=True, tag="flush", frozen=True):
    """Export all that came before this frame within so many seconds, then answer `Flushed`."""

    number: Count
    timeout_seconds: Annotated[float, msgspec.Meta(ge=0, le=1e9)]


class Flushed(msgspec.Struct, array_like=True, tag="flushed", frozen=True):
    """The relay's answer: whether all that came before was exported."""

    number: Count
    complete: bool


class Switch(msgspec.Struct, array_like=True, tag="switch", frozen=True):
    """Capture, or capture nothing for the moment: from the relay to each process, and from who looks to the relay."""

    on: bool


class Switched(msgspec.Struct, array_like=True, tag="switched", frozen=True):
    """A process's answer: whether it captures now."""

    on: bool


class Look(msgspec.Struct, array_like=True, tag="look", frozen=True):
    """Who is here, and how is it? Whoever asks is no traced process: it looks at the others (`wire.looking`).

    With `follow` all that they send is passed on to it from now on, and the spans of requests as they are made.
    """

    protocol: int
    follow: bool = False


Frame: TypeAlias = (
    Hello
    | Step
    | Ping
    | Unfinished
    | Request
    | Scheduled
    | Updated
    | Keep
    | RequestEnd
    | Transfers
    | Flush
    | Look
    | Switch
    | Switched
)


class Several(msgspec.Struct, array_like=True, tag="several", frozen=True):
    """Several frames in one packet, each to be decoded by `decode_frame`: one that is bad costs no other."""

    frames: list[msgspec.Raw]


LINK_BYTES: Final = 25  # trace id (16), span id (8), trace flags (1)

encode = msgspec.msgpack.Encoder().encode
decode_flushed = msgspec.msgpack.Decoder(Flushed).decode
decode_switch = msgspec.msgpack.Decoder(Switch).decode
_decode = msgspec.msgpack.Decoder(Frame).decode
_decode_several = msgspec.msgpack.Decoder(Several).decode
_SEVERAL_BEGIN: Final = encode(Several([]))[:-1]
SWITCH_BEGINS: Final = encode(Switch(True))[:-1]
"""With this a packet begins that is a `Switch`."""


def frames_in(packet: bytes | memoryview | msgspec.Raw) -> list[bytes | memoryview | msgspec.Raw]:
    """The frames of a packet, which is one frame or several, each for `decode_frame`.

    Raises:
        ValueError: It begins as several and goes on as something else.
    """
    if memoryview(packet)[: len(_SEVERAL_BEGIN)] != _SEVERAL_BEGIN:
        return [packet]
    return [*_decode_several(packet).frames]


def decode_frame(packet: bytes | memoryview | msgspec.Raw) -> Frame:
    """A frame.

    Raises:
        ValueError: It is not a frame, or holds what can't be; the text says what.
    """
    frame: Frame = _decode(packet)
    check = _CHECKS.get(type(frame))
    if check is not None:
        check(frame)
    return frame


def _check_step(step: Step) -> None:
    _check_id("trace id", step.trace_id, 16, may_be_absent=True)
    _check_id("span id", step.span_id, 8, may_be_absent=not step.trace_id or step.bare)
    _check_id("parent span id", step.parent_span_id, 8, may_be_absent=True)
    for link in step.links:
        if len(link) != LINK_BYTES:
            raise ValueError(f"a link of {len(link)} bytes, not {LINK_BYTES}")


def _check_ping(ping: Ping) -> None:
    if ping.seen_ns < ping.before_ns:
        raise ValueError("a ping that was seen before it was sent")


def _check_unfinished(unfinished: Unfinished) -> None:
    _check_id("trace id", unfinished.trace_id, 16, may_be_absent=True)
    for span_id in (unfinished.parent_span_id, unfinished.span_id, unfinished.engine_span_id):
        _check_id("span id", span_id, 8, may_be_absent=True)
    if unfinished.now_ns < unfinished.entered_ns:
        raise ValueError("a stage that is entered in the future")


def _check_request(request: Request) -> None:
    _check_id("request key", request.key, 8, may_be_absent=False)
    _check_id("trace id", request.trace_id, 16, may_be_absent=False)
    _check_id("parent span id", request.parent_span_id, 8, may_be_absent=False)


def _check_scheduled(scheduled: Scheduled) -> None:
    _check_id("trace id", scheduled.trace_id, 16, may_be_absent=True)
    _check_id("span id", scheduled.span_id, 8, may_be_absent=False)
    _check_id("span id", scheduled.like, 8, may_be_absent=True)
    if not len(scheduled.requests) == len(scheduled.tokens) == len(scheduled.prefills):
        raise ValueError(f"{len(scheduled.requests)} requests with {len(scheduled.tokens)} counts of tokens")
    if not len(scheduled.first) == len(scheduled.cached) == len(scheduled.fetched):
        raise ValueError(f"{len(scheduled.first)} new requests with {len(scheduled.cached)} counts of cached tokens")
    if sum(scheduled.tokens) > scheduled.total_tokens or len(scheduled.requests) > scheduled.total_requests:
        raise ValueError("a step with more in its parts than in all")


def _check_updated(updated: Updated) -> None:
    _check_id("span id", updated.span_id, 8, may_be_absent=False)
    if len(updated.requests) != len(updated.new_tokens):
        raise ValueError(f"{len(updated.requests)} requests with {len(updated.new_tokens)} counts of new tokens")
    if not len(updated.drafted) == len(updated.accepted) in {0, len(updated.requests)}:
        raise ValueError(f"{len(updated.requests)} requests with {len(updated.drafted)} counts of drafts")


def _check_transfers(transfers: Transfers) -> None:
    if len(transfers.loading) != len(transfers.tokens):
        raise ValueError(f"{len(transfers.loading)} loads with {len(transfers.tokens)} counts of tokens")


def _check_keep(keep: Keep) -> None:
    for span_id in keep.span_ids:
        _check_id("span id", span_id, 8, may_be_absent=False)


def _check_request_end(end: RequestEnd) -> None:
    _check_id("request key", end.key, 8, may_be_absent=False)


_CHECKS: Final[dict[type, Callable[[Any], None]]] = {
    Step: _check_step,
    Ping: _check_ping,
    Unfinished: _check_unfinished,
    Request: _check_request,
    Scheduled: _check_scheduled,
    Updated: _check_updated,
    Keep: _check_keep,
    Transfers: _check_transfers,
    RequestEnd: _check_request_end,
}


def _check_id(what: str, value: bytes, length: int, *, may_be_absent: bool) -> None:
    if not value and may_be_absent:
        return
    if len(value) != length or not any(value):
        raise ValueError(f"a {what} of {len(value)} bytes, not {length}, or all zero")
