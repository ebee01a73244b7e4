"""Every name that leaves this project in a span or a metric: one place, each with its unit and meaning.

Keys of our own stand under `npu.`; the rest are OpenTelemetry's own conventions.
"""

from __future__ import annotations

from typing import Final, NamedTuple

SCOPE: Final = "otel_npu"
SCHEMA_URL: Final = "https://opentelemetry.io/schemas/1.37.0"


class Term(NamedTuple):
    """A name, the unit of its value (UCUM; empty for text, flags and counts of nothing) and what it means."""

    name: str
    unit: str
    meaning: str


class Metric(NamedTuple):
    """A metric: what kind of instrument it is, its unit (UCUM), what it means, and the attributes of its points.

    `bounds` are a histogram's buckets, in nanoseconds where the unit is seconds, as whole numbers elsewhere.
    """

    name: str
    kind: str
    unit: str
    meaning: str
    attributes: tuple[str, ...] = ()
    bounds: tuple[int, ...] = ()


def seconds(nanoseconds: float) -> float:
    """A time as an attribute has it: to the nanosecond, without the digits that a sum of fractions would add."""
    return round(nanoseconds) / 1e9


# Spans. A stage span has the stage's own name.
ENGINE_STEP: Final = "engine_step"
WORKER_STEP: Final = "worker_step"
QUEUE: Final = "queue"
PREFILL: Final = "prefill"
DECODE: Final = "decode"
PREFILL_STEP: Final = "prefill_step"
DECODE_STEP: Final = "decode_step"
OTHER_STEPS: Final = "other_steps"
KV_LOAD: Final = "kv_load"
KV_SEND: Final = "kv_send"
UNFINISHED_STAGE: Final = "unfinished_stage"
HOST_TIMED: Final = " (host)"
"""What the name of a stage ends with that the host timed in the place of the device."""
DOCTOR_TEST: Final = "doctor_test"

SPANS: Final = (
    Term(ENGINE_STEP, "", "One step of an engine, host-timed: from its scheduling to the taking in of its output."),
    Term(
        WORKER_STEP,
        "",
        "One step of one rank: from its first stage on the device to its last. Where an engine has several ranks, "
        "its number is in the name, `worker_step rank 1`: neither Jaeger nor Grafana shows anything else beside it.",
    ),
    Term("<stage name>", "", "One stage: the time on the stream between its two events, waits included."),
    Term(
        "<stage name>" + HOST_TIMED,
        "",
        "A stage that the host's clock timed although the process has a device: it does no work there, or its events "
        "were not to be had.",
    ),
    Term(
        UNFINISHED_STAGE,
        "",
        "A stage that did not finish within OTEL_NPU_HANG_SECONDS; host-timed, sent while it still hangs.",
    ),
    Term(
        QUEUE,
        "",
        "A request's wait: from its arrival to the first scheduling of it, or to the fetching of its KV cache from "
        "elsewhere. Host-timed.",
    ),
    Term(
        KV_LOAD,
        "",
        "A request's wait for KV cache from elsewhere, from the engine's asking for it to its arrival. Host-timed. "
        "A connector that loads inside the step has a stage of this name in the step instead.",
    ),
    Term(
        KV_SEND,
        "",
        "From the end of a request to the release of its KV cache, which somebody else had still to fetch. Host-timed, "
        "and sent when it is over.",
    ),
    Term(PREFILL, "", "The steps that computed a request's prompt, from the first's start to the last's end."),
    Term(DECODE, "", "A request's further steps, from the first's start to the last's end."),
    Term(
        PREFILL_STEP,
        "",
        "One step of a prefill of several: of up to 64 the slowest, with `OTEL_NPU_REQUEST_SPANS=detail` of up to 256.",
    ),
    Term(
        DECODE_STEP,
        "",
        "One of a decode's slowest steps: up to 3 have spans, with `OTEL_NPU_REQUEST_SPANS=detail` up to 256, "
        "which are all of most requests.",
    ),
    Term(
        OTHER_STEPS,
        "",
        "The steps of a phase between two that have spans: `npu.request.steps` says how many, and their stages are "
        "in the sums of the phase.",
    ),
    Term(DOCTOR_TEST, "", "What `otel-npu doctor` sends to see whether spans are taken."),
)

# Events on the spans of a request.
PREEMPTED: Final = "preempted"
KV_LOAD_FAILED: Final = "kv_load_failed"

EVENTS: Final = (
    Term(PREEMPTED, "", "The request was put back into the queue to make room for others."),
    Term(KV_LOAD_FAILED, "", "KV cache from elsewhere that a step was to load did not come. Also an `error.type`."),
)

# Attributes of a step.
STEP_NUMBER: Final = "npu.step.number"
STEP_KIND: Final = "npu.step.kind"
STEP_STAGES: Final = "npu.step.stages"
STEP_REQUESTS: Final = "npu.step.requests"
STEP_TOKENS: Final = "npu.step.tokens"
STEP_RANKS: Final = "npu.step.ranks"
SAMPLED_REASON: Final = "npu.sampled.reason"
STEP_CACHED_TOKENS: Final = "npu.step.cached_tokens"
STEP_FETCHED_TOKENS: Final = "npu.step.fetched_tokens"
STEP_DRAFTED_TOKENS: Final = "npu.step.drafted_tokens"
STEP_ACCEPTED_TOKENS: Final = "npu.step.accepted_tokens"
STEP_STRAGGLER: Final = "npu.step.straggler.rank"
STEP_SKEW: Final = "npu.step.skew"
STEP_IDLE: Final = "npu.step.idle"
STEP_LAUNCH_BOUND: Final = "npu.step.launch_bound"
RANK: Final = "npu.rank"
DROPPED_PREFIX: Final = "npu.dropped."
DROP_REASON: Final = "npu.drop.reason"
TP_RANK: Final = "npu.tp.rank"
PP_RANK: Final = "npu.pp.rank"
DP_RANK: Final = "npu.dp.rank"
GRAPH_MODE: Final = "npu.graph.mode"

# Attributes of a stage.
STAGE_NAME: Final = "npu.stage.name"
RAW_NAME: Final = "npu.stage.raw_name"
TIMING: Final = "npu.timing"
DEVICE_INDEX: Final = "npu.device.index"
STREAM_ID: Final = "npu.stream.id"
HOST_DURATION: Final = "npu.host.duration"
DEVICE_DURATION: Final = "npu.device.duration"
ENQUEUE_DELAY: Final = "npu.enqueue.delay"
CLOCK_UNCERTAINTY: Final = "npu.clock.uncertainty"
UNFINISHED_FOR: Final = "npu.unfinished.duration"
ERROR_TYPE: Final = "error.type"

# Attributes of the `llm_request` that is made for an aborted request: vLLM's own names.
REQUEST_ID: Final = "gen_ai.request.id"
RESPONSE_ID: Final = "gen_ai.response.id"
FINISH_REASONS: Final = "gen_ai.response.finish_reasons"
PROMPT_TOKENS: Final = "gen_ai.usage.prompt_tokens"
COMPLETION_TOKENS: Final = "gen_ai.usage.completion_tokens"
LATENCY: Final = "gen_ai.latency.e2e"

# Attributes of the host's NPUs, which the resource detector adds to a program's own resource.
HW_ID: Final = "hw.id"
HW_TYPE: Final = "hw.type"
HW_NAME: Final = "hw.name"
HW_DRIVER_VERSION: Final = "hw.driver_version"
CANN_VERSION: Final = "npu.cann.version"

HW_TYPE_NPU: Final = "npu"

# Why a step is kept as a trace.
RATE: Final = "rate"
SLOW: Final = "slow"
ERROR: Final = "error"
HANG: Final = "hang"

TIMING_DEVICE: Final = "device"
TIMING_HOST: Final = "host"

# Attributes of a request's spans, beside REQUEST_ID.
REQUEST_STEPS: Final = "npu.request.steps"
REQUEST_DEVICE_TIME: Final = "npu.request.device_time"
REQUEST_STAGE_DEVICE_TIME: Final = "npu.request.stage.<name>.device_time"
REQUEST_ATTRIBUTED_DEVICE_TIME: Final = "npu.request.attributed_device_time"
REQUEST_WAIT: Final = "npu.request.wait"
REQUEST_SURPLUS_STEPS: Final = "npu.request.surplus_steps"
REQUEST_SURPLUS_DEVICE_TIME: Final = "npu.request.surplus_device_time"
REQUEST_UNTIMED_STEPS: Final = "npu.request.untimed_steps"
REQUEST_OTHER_STEPS: Final = "npu.request.other_steps"
REQUEST_STEP_TOKENS: Final = "npu.request.step_tokens"
OMITTED_HOST_TIME: Final = "npu.omitted_host_time"
REQUEST_FINISH_REASON: Final = "npu.request.finish_reason"
REQUEST_CACHED_TOKENS: Final = "gen_ai.usage.cache_read.input_tokens"
REQUEST_FETCHED_TOKENS: Final = "npu.request.fetched_tokens"
REQUEST_DRAFTED_TOKENS: Final = "npu.request.drafted_tokens"
REQUEST_ACCEPTED_TOKENS: Final = "npu.request.accepted_tokens"
KV_TOKENS: Final = "npu.kv.tokens"
KV_CONNECTOR: Final = "npu.kv.connector"

# Attributes of the resource: one for each traced process.
SERVICE_NAME: Final = "service.name"
SERVICE_INSTANCE_ID: Final = "service.instance.id"
PROCESS_PID: Final = "process.pid"
HOST_NAME: Final = "host.name"
DEVICE_TYPE: Final = "npu.device.type"
DEVICE_NAME: Final = "npu.device.name"

ATTRIBUTES: Final = (
    Term(STEP_NUMBER, "{step}", "Counts the steps of one process, from 1."),
    Term(STEP_KIND, "", "What the step did, such as prefill, decode, mixed or dummy."),
    Term(STEP_STAGES, "{stage}", "How many stages the step recorded."),
    Term(STEP_REQUESTS, "{request}", "How many requests the step served, sampled or not."),
    Term(STEP_TOKENS, "{token}", "How many tokens were scheduled for the step, of all its requests."),
    Term(STEP_RANKS, "{rank}", "How many ranks the engine gave the step to."),
    Term(
        SAMPLED_REASON,
        "",
        "Why the step was kept as a trace: rate (OTEL_NPU_STEPS_PER_SECOND), slow (OTEL_NPU_SLOW_STEP), error or hang.",
    ),
    Term(
        STEP_CACHED_TOKENS,
        "{token}",
        "Prompt tokens of the requests that the step scheduled for the first time which the engine's own cache had.",
    ),
    Term(STEP_FETCHED_TOKENS, "{token}", "The same of those whose KV cache came from elsewhere."),
    Term(STEP_DRAFTED_TOKENS, "{token}", "How many drafted tokens the step verified."),
    Term(STEP_ACCEPTED_TOKENS, "{token}", "How many of them were accepted."),
    Term(
        STEP_STRAGGLER,
        "",
        "The rank that started `forward` last, for which the others wait in their first collective: of ranks that work "
        "on the same stage of the pipeline. Only where npu.step.skew is there.",
    ),
    Term(
        STEP_SKEW,
        "s",
        "By how much later it started than the first. Only where every rank's `forward` is timed by its device and the "
        "skew is more than the clocks of the two leave open.",
    ),
    Term(
        STEP_IDLE,
        "s",
        "The bubble before the step: from the end of the last stage of the step before on the same device to the start "
        "of the first of this one, by the device's clock. On engine_step of the rank that returns the output.",
    ),
    Term(
        STEP_LAUNCH_BOUND,
        "",
        "Whether the host was no faster than the device: the step's longest outermost stage ended on the device within "
        "a tenth of its duration after the host had launched all of it. Only where the clock is that sure.",
    ),
    Term(
        RANK,
        "",
        "The worker's rank in its engine. On a request's spans the one whose times they are: it returns the output.",
    ),
    Term(
        DROPPED_PREFIX + "<reason>",
        "{drop}",
        "What was left out since the last step span, by reason; see DROP_REASONS. What the relay left out, "
        "of whichever process, goes with the next step span of any.",
    ),
    Term(DROP_REASON, "", "Of metrics: why something was left out; see DROP_REASONS."),
    Term(TP_RANK, "", "The worker's tensor-parallel rank."),
    Term(PP_RANK, "", "The worker's pipeline-parallel rank: its stage of the pipeline."),
    Term(DP_RANK, "", "The engine's data-parallel rank."),
    Term(GRAPH_MODE, "", "How the step's forward ran: none (eager), piecewise or full; where it is known."),
    Term(STAGE_NAME, "", "The stage; on spans the one that is unfinished."),
    Term(RAW_NAME, "", "What the engine itself calls the stage, where that is another name."),
    Term(
        TIMING,
        "",
        "device: measured by events on the device; host: by the host's clock. On every span of ours; of several "
        "stages it is device if the device timed any outermost one of each step.",
    ),
    Term(DEVICE_INDEX, "", "The device's index in its process."),
    Term(STREAM_ID, "", "The stream of the stage, as the framework numbers it; 0 is the default stream."),
    Term(DEVICE_DURATION, "s", "From the stage's first event to its second by the device's clock: the span's length."),
    Term(HOST_DURATION, "s", "From entry to exit of the stage on the host: how long launching took."),
    Term(ENQUEUE_DELAY, "s", "From the host's enqueueing of the stage to its start on the device."),
    Term(CLOCK_UNCERTAINTY, "s", "The span's place on the wall clock is known to plus or minus this."),
    Term(UNFINISHED_FOR, "s", "For how long the stage had been unfinished."),
    Term(ERROR_TYPE, "", "Type of the exception that left the stage or step."),
    Term(REQUEST_ID, "", "The request, as vLLM's own span of it names it."),
    Term(RESPONSE_ID, "", "The request, by the id that its client got: of `/v1/completions` it is a shorter one."),
    Term(FINISH_REASONS, "", "Why the request ended; `abort` when its client went away."),
    Term(PROMPT_TOKENS, "{token}", "Length of the prompt."),
    Term(COMPLETION_TOKENS, "{token}", "How many tokens were generated."),
    Term(LATENCY, "s", "From the request's arrival to its end."),
    Term(REQUEST_STEPS, "{step}", "How many steps the phase took."),
    Term(
        REQUEST_DEVICE_TIME,
        "s",
        "How long the phase's steps took on the device, other requests in the same batches included: "
        "the sum of their outermost stages. Where the device timed no stage of a step, by the host's clock.",
    ),
    Term(REQUEST_STAGE_DEVICE_TIME, "s", "The part of it that was in this outermost stage."),
    Term(
        REQUEST_ATTRIBUTED_DEVICE_TIME,
        "s",
        "The request's share of it, by scheduled tokens; on its last phase with the share of the surplus steps, "
        "so that over all requests of a step the shares add up to the step.",
    ),
    Term(REQUEST_WAIT, "s", "The gaps between the phase's steps, in which the request was not computed."),
    Term(
        REQUEST_SURPLUS_STEPS,
        "{step}",
        "Steps that were scheduled for the request before the engine knew that it was over; in no phase. On the last.",
    ),
    Term(REQUEST_SURPLUS_DEVICE_TIME, "s", "How long the surplus steps took on the device."),
    Term(REQUEST_UNTIMED_STEPS, "{step}", "Steps of the request whose times did not come; in no phase. On the last."),
    Term(REQUEST_OTHER_STEPS, "{step}", "How many of the phase's steps have no spans of their own, if any."),
    Term(REQUEST_STEP_TOKENS, "{token}", "How many of the step's tokens were the request's."),
    Term(
        OMITTED_HOST_TIME,
        "s",
        "The sum of the step's stages that have no span in the request's trace: the host alone timed them, "
        "and each took less than 5 % of the step. Step traces have them all.",
    ),
    Term(
        REQUEST_CACHED_TOKENS,
        "{token}",
        "Tokens of the prompt that were not computed because a cache had them, those from elsewhere included. "
        "On the first phase.",
    ),
    Term(REQUEST_FETCHED_TOKENS, "{token}", "Those of them whose KV cache came from elsewhere. On the first phase."),
    Term(REQUEST_DRAFTED_TOKENS, "{token}", "How many tokens were drafted for the request. On the last phase."),
    Term(REQUEST_ACCEPTED_TOKENS, "{token}", "How many of them were accepted. On the last phase."),
    Term(KV_TOKENS, "{token}", "How many tokens' KV cache the request waits for."),
    Term(KV_CONNECTOR, "", "The class of the KV connector."),
    Term(REQUEST_FINISH_REASON, "", "Why the request ended, as the front end says: stop, length, abort and so on."),
    Term(SERVICE_NAME, "", "As the traced process's own OpenTelemetry SDK would compute it."),
    Term(SERVICE_INSTANCE_ID, "", "Unique to each traced process."),
    Term(PROCESS_PID, "", "The traced process."),
    Term(HOST_NAME, "", "The host of the traced process."),
    Term(
        DEVICE_TYPE,
        "",
        "The kind of device whose clock timed the stages: npu, cpu, ... Only of a process that has stages.",
    ),
    Term(DEVICE_NAME, "", "The device's model, such as Ascend910B3."),
    Term(HW_ID, "", "The host's NPUs by their device nodes, separated by commas: davinci0,davinci1. Detector only."),
    Term(HW_TYPE, "", "npu: what the hardware named by hw.id is. Detector only."),
    Term(HW_NAME, "", "The NPUs' model, such as Ascend910B, if they are of one. Detector only."),
    Term(HW_DRIVER_VERSION, "", "The version of the NPUs' driver. Detector only."),
    Term(CANN_VERSION, "", "The version of CANN on the host. Detector only."),
)

# Why something was left out. The first group is counted in the traced process, the second in the relay.
POOL_EXHAUSTED: Final = "pool_exhausted"
STREAM_CAPTURED: Final = "stream_captured"
STEP_TOO_LARGE: Final = "step_too_large"
STEP_TOO_DEEP: Final = "step_too_deep"
REENTERED: Final = "reentered"
INTERRUPTED: Final = "interrupted"
BACKLOG_FULL: Final = "backlog_full"
TIMES_UNREADABLE: Final = "times_unreadable"
PING_UNANSWERED: Final = "ping_unanswered"
BAD_ATTRIBUTE: Final = "bad_attribute"
ATTRIBUTE_TOO_LARGE: Final = "attribute_too_large"
TOO_MANY_LINKS: Final = "too_many_links"
BAD_LINK: Final = "bad_link"
TOO_MANY_NAMES: Final = "too_many_names"
TOO_MANY_SLOW: Final = "too_many_slow"
TOO_MANY_HELD: Final = "too_many_held"
BAD_FRAME: Final = "bad_frame"
INTERNAL_ERROR: Final = "internal_error"
RELAY_LOST: Final = "relay_lost"
REQUEST_UNFINISHED: Final = "request_unfinished"
TOO_MANY_REQUESTS: Final = "too_many_requests"
RELAY_BUSY: Final = "relay_busy"
RELAY_FULL: Final = "relay_full"
QUEUE_FULL: Final = "queue_full"
EXPORT_FAILED: Final = "export_failed"
EXPORT_REFUSED: Final = "export_refused"
EXPORT_REJECTED: Final = "export_rejected"
NOT_ENCODABLE: Final = "not_encodable"
OTHER: Final = "other"

DROP_REASONS: Final = (
    Term(POOL_EXHAUSTED, "{stage}", "No free event pair: the device is too far behind. Host-timed instead."),
    Term(STREAM_CAPTURED, "{stage}", "The stream was being captured into a graph. Not recorded."),
    Term(STEP_TOO_LARGE, "{stage}", "More stages than one step holds. Not recorded."),
    Term(STEP_TOO_DEEP, "{step}", "Steps opened inside one another too deeply. Not recorded."),
    Term(REENTERED, "", "A stage or step object was entered again while open. Not recorded."),
    Term(INTERRUPTED, "", "A signal handler of the program's raised while a stage or a step was entered or left."),
    Term(
        BACKLOG_FULL,
        "{frame}",
        "The relay did not keep up, or the device was behind: the bounded buffer was full.",
    ),
    Term(TIMES_UNREADABLE, "{stage}", "The device's times could not be read. Host-timed instead."),
    Term(PING_UNANSWERED, "{ping}", "A device did not answer a look at its clock in time, or with an error."),
    Term(BAD_ATTRIBUTE, "{attribute}", "Not a string, number, flag or a list of one of these."),
    Term(ATTRIBUTE_TOO_LARGE, "{attribute}", "The largest attributes of a step that is too large for a packet."),
    Term(BAD_LINK, "{link}", "An entry of `requests` that is neither a traceparent nor a span context."),
    Term(TOO_MANY_LINKS, "{link}", "More requests than a step can be linked to."),
    Term(
        TOO_MANY_NAMES,
        "{value}",
        "Values of a metric whose stage name, or other text, was one too many: under `other`.",
    ),
    Term(TOO_MANY_SLOW, "{step}", "Slow steps beyond the few a second that are kept for it. Their times are counted."),
    Term(
        TOO_MANY_HELD,
        "{step}",
        "Steps that were let go of before it was known whether they are slow: more than the relay holds.",
    ),
    Term(BAD_FRAME, "{frame}", "A frame that the relay could not read, or one too large to send."),
    Term(INTERNAL_ERROR, "{error}", "A fault of otel-npu's own; the log has it."),
    Term(RELAY_LOST, "{relay}", "A relay ended early, with what it held. Counted once by each process that had it."),
    Term(REQUEST_UNFINISHED, "{request}", "The engine went away before the request's end was known: no spans of it."),
    Term(
        TOO_MANY_REQUESTS,
        "{request}",
        "More requests at once than the relay follows: no spans of the newest of the engine that has most.",
    ),
    Term(RELAY_BUSY, "{step}", "The relay had more to read than it could make spans of: the oldest steps have none."),
    Term(RELAY_FULL, "{frame}", "A process made the relay hold more than it may: a frame that would have added to it."),
    Term(QUEUE_FULL, "{span}", "The exporter did not keep up and the bounded queue was full: the oldest."),
    Term(EXPORT_FAILED, "{span}", "The receiver took none for five minutes, or until the relay's end."),
    Term(EXPORT_REFUSED, "{span}", "The receiver refused them for good: not authorised, invalid, or too large."),
    Term(EXPORT_REJECTED, "{span}", "The receiver took the others and rejected these; the log has its message."),
    Term(NOT_ENCODABLE, "{span}", "Something in the span is not what OTLP takes."),
    Term(OTHER, "", "What a traced process counted under a reason that the relay does not know."),
)

# Metrics.
COUNTER: Final = "counter"
GAUGE: Final = "gauge"
HISTOGRAM: Final = "histogram"

_SECONDS: Final = tuple(
    number * 10**exponent for exponent in range(3, 10) for number in (10, 25, 50) if number * 10**exponent <= 10**10
)
"""From 10 us to 10 s."""
_COUNTS: Final = tuple(2**exponent for exponent in range(17))

_PROCESS: Final = (RANK, DP_RANK)
_STAGE: Final = (STAGE_NAME, STEP_KIND, *_PROCESS, DEVICE_INDEX, TIMING, GRAPH_MODE)
_STEP: Final = (STEP_KIND, *_PROCESS)

STAGE_DURATION: Final = Metric(
    "npu.stage.duration",
    HISTOGRAM,
    "s",
    "How long a stage took on its stream, waits included; of a stage without device work how long the host took.",
    _STAGE,
    _SECONDS,
)
STAGE_HOST_TIME: Final = Metric(
    "npu.stage.host_time",
    COUNTER,
    "s",
    "How long the host took to launch the stages that the device timed. About as much as their duration: launch-bound.",
    _STAGE,
)
STAGE_ENQUEUE_DELAY: Final = Metric(
    ENQUEUE_DELAY,
    HISTOGRAM,
    "s",
    "From the host's enqueueing of a stage to its start on the device.",
    (STAGE_NAME, STEP_KIND, *_PROCESS, DEVICE_INDEX),
    _SECONDS,
)
STEP_DURATION: Final = Metric(
    "npu.step.duration",
    HISTOGRAM,
    "s",
    "How long a rank's step took on the device, from the start of its first stage to the end of its last.",
    (*_STEP, DEVICE_INDEX, TIMING, GRAPH_MODE),
    _SECONDS,
)
DEVICE_STEP_TIME: Final = Metric(
    "npu.device.step_time",
    COUNTER,
    "s",
    "For how long the device had a step on it: its rate is how busy the stream was with steps.",
    (*_PROCESS, DEVICE_INDEX),
)
IDLE: Final = Metric(
    STEP_IDLE,
    HISTOGRAM,
    "s",
    "For how long the device had nothing of the step before and not yet of this one: the bubble between them.",
    (*_STEP, DEVICE_INDEX),
    _SECONDS,
)
SKEW: Final = Metric(
    "npu.rank.skew",
    HISTOGRAM,
    "s",
    "By how much later than the first the last rank started its forward, where that exceeds the clocks' uncertainty.",
    (STEP_KIND,),
    _SECONDS,
)
STRAGGLES: Final = Metric(
    "npu.rank.straggles", COUNTER, "{step}", "Steps in which the others had to wait for this rank.", _PROCESS
)
ENGINE_STEP_TOKENS: Final = Metric(
    STEP_TOKENS, HISTOGRAM, "{token}", "How many tokens an engine scheduled for a step.", (STEP_KIND,), _COUNTS
)
ENGINE_STEP_REQUESTS: Final = Metric(
    STEP_REQUESTS, HISTOGRAM, "{request}", "How many requests a step of an engine served.", (STEP_KIND,), _COUNTS
)
REQUEST_TIME: Final = Metric(
    REQUEST_DEVICE_TIME,
    HISTOGRAM,
    "s",
    "How long the steps of a sampled request took on the device, other requests in the same batches included.",
    (REQUEST_FINISH_REASON,),
    _SECONDS,
)
REQUEST_ATTRIBUTED_TIME: Final = Metric(
    REQUEST_ATTRIBUTED_DEVICE_TIME,
    HISTOGRAM,
    "s",
    "A sampled request's share of that, by scheduled tokens.",
    (REQUEST_FINISH_REASON,),
    _SECONDS,
)
HANGS: Final = Metric(
    "npu.hangs",
    COUNTER,
    "{hang}",
    "Stages that did not finish within OTEL_NPU_HANG_SECONDS.",
    (STAGE_NAME, STEP_KIND, RANK, DEVICE_INDEX),
)
STEPS_CAPTURED: Final = Metric(
    "npu.steps.captured",
    COUNTER,
    "{step}",
    "Steps that a process has begun, by their numbers. Where more were captured than resolved, some are lost.",
    _PROCESS,
)
STEPS_RESOLVED: Final = Metric("npu.steps.resolved", COUNTER, "{step}", "Steps whose times have arrived.", _PROCESS)
STEPS_KEPT: Final = Metric(
    "npu.steps.kept",
    COUNTER,
    "{step}",
    "Steps of a rank that became traces, by why they did.",
    (SAMPLED_REASON, *_PROCESS),
)
RESOLVER_LAG: Final = Metric(
    "npu.resolver.lag",
    HISTOGRAM,
    "s",
    "From the end of a step on the device until its process saw it.",
    _PROCESS,
    _SECONDS,
)
UNCERTAINTY: Final = Metric(
    CLOCK_UNCERTAINTY,
    GAUGE,
    "s",
    "The place of the last step on the wall clock is known to plus or minus this.",
    (*_PROCESS, DEVICE_INDEX),
)
DROPS: Final = Metric("npu.drops", COUNTER, "{drop}", "What was left out, by reason; see DROP_REASONS.", (DROP_REASON,))
SPANS_EXPORTED: Final = Metric("npu.relay.spans.exported", COUNTER, "{span}", "Spans that the receiver took.")
QUEUE_SIZE: Final = Metric("npu.relay.queue.size", GAUGE, "By", "How much of spans waits to be exported.")
QUEUE_LIMIT: Final = Metric("npu.relay.queue.limit", GAUGE, "By", "How much may wait.")
RELAY_MEMORY: Final = Metric("npu.relay.memory.usage", GAUGE, "By", "Physical memory of the relay's process.")
RELAY_CPU: Final = Metric("npu.relay.cpu.time", COUNTER, "s", "Processor time of the relay's process.")

METRICS: Final = (
    STAGE_DURATION,
    STAGE_HOST_TIME,
    STAGE_ENQUEUE_DELAY,
    STEP_DURATION,
    DEVICE_STEP_TIME,
    IDLE,
    SKEW,
    STRAGGLES,
    ENGINE_STEP_TOKENS,
    ENGINE_STEP_REQUESTS,
    REQUEST_TIME,
    REQUEST_ATTRIBUTED_TIME,
    HANGS,
    STEPS_CAPTURED,
    STEPS_RESOLVED,
    STEPS_KEPT,
    RESOLVER_LAG,
    UNCERTAINTY,
    DROPS,
    SPANS_EXPORTED,
    QUEUE_SIZE,
    QUEUE_LIMIT,
    RELAY_MEMORY,
    RELAY_CPU,
)
