"""Every name that leaves this project in a span: one place, each with its unit and meaning.

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


# Spans. A stage span has the stage's own name.
WORKER_STEP: Final = "worker_step"
UNFINISHED_STAGE: Final = "unfinished_stage"

SPANS: Final = (
    Term(WORKER_STEP, "", "One step of one rank: from its first stage on the device to its last."),
    Term("<stage name>", "", "One stage: the time on the stream between its two events, waits included."),
    Term(
        UNFINISHED_STAGE,
        "",
        "A stage that did not finish within OTEL_NPU_HANG_SECONDS; host-timed, sent while it still hangs.",
    ),
)

# Attributes of a step.
STEP_NUMBER: Final = "npu.step.number"
STEP_KIND: Final = "npu.step.kind"
STEP_STAGES: Final = "npu.step.stages"
DROPPED_PREFIX: Final = "npu.dropped."

# Attributes of a stage.
STAGE_NAME: Final = "npu.stage.name"
TIMING: Final = "npu.timing"
DEVICE_INDEX: Final = "npu.device.index"
STREAM_ID: Final = "npu.stream.id"
HOST_DURATION: Final = "npu.host.duration"
ENQUEUE_DELAY: Final = "npu.enqueue.delay"
CLOCK_UNCERTAINTY: Final = "npu.clock.uncertainty"
UNFINISHED_FOR: Final = "npu.unfinished.duration"
ERROR_TYPE: Final = "error.type"

TIMING_DEVICE: Final = "device"
TIMING_HOST: Final = "host"

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
    Term(
        DROPPED_PREFIX + "<reason>",
        "{drop}",
        "What was left out since the last step span, by reason; see DROP_REASONS. What the relay left out, "
        "of whichever process, goes with the next step span of any.",
    ),
    Term(STAGE_NAME, "", "The stage that is unfinished."),
    Term(TIMING, "", "device: measured by events on the device; host: by the host's clock."),
    Term(DEVICE_INDEX, "", "The device's index in its process."),
    Term(STREAM_ID, "", "The stream of the stage, as the framework numbers it; 0 is the default stream."),
    Term(HOST_DURATION, "s", "From entry to exit of the stage on the host: how long launching took."),
    Term(ENQUEUE_DELAY, "s", "From the host's enqueueing of the stage to its start on the device."),
    Term(CLOCK_UNCERTAINTY, "s", "The span's place on the wall clock is known to plus or minus this."),
    Term(UNFINISHED_FOR, "s", "For how long the stage had been unfinished."),
    Term(ERROR_TYPE, "", "Type of the exception that left the stage or step."),
    Term(SERVICE_NAME, "", "As the traced process's own OpenTelemetry SDK would compute it."),
    Term(SERVICE_INSTANCE_ID, "", "Unique to each traced process."),
    Term(PROCESS_PID, "", "The traced process."),
    Term(HOST_NAME, "", "The host of the traced process."),
    Term(DEVICE_TYPE, "", "The kind of device whose clock timed the stages, such as npu, cpu or simulated."),
    Term(DEVICE_NAME, "", "The device's model, such as Ascend910B3."),
)

# Why something was left out. The first group is counted in the traced process, the second in the relay.
POOL_EXHAUSTED: Final = "pool_exhausted"
STREAM_CAPTURED: Final = "stream_captured"
STEP_TOO_LARGE: Final = "step_too_large"
STEP_TOO_DEEP: Final = "step_too_deep"
REENTERED: Final = "reentered"
BACKLOG_FULL: Final = "backlog_full"
TIMES_UNREADABLE: Final = "times_unreadable"
PING_UNANSWERED: Final = "ping_unanswered"
BAD_ATTRIBUTE: Final = "bad_attribute"
TOO_MANY_LINKS: Final = "too_many_links"
BAD_LINK: Final = "bad_link"
BAD_FRAME: Final = "bad_frame"
INTERNAL_ERROR: Final = "internal_error"
RELAY_LOST: Final = "relay_lost"
QUEUE_FULL: Final = "queue_full"
EXPORT_FAILED: Final = "export_failed"

DROP_REASONS: Final = (
    Term(POOL_EXHAUSTED, "{stage}", "No free event pair: the device is too far behind. Host-timed instead."),
    Term(STREAM_CAPTURED, "{stage}", "The stream was being captured into a graph. Not recorded."),
    Term(STEP_TOO_LARGE, "{stage}", "More stages than one step holds. Not recorded."),
    Term(STEP_TOO_DEEP, "{step}", "Steps opened inside one another too deeply. Not recorded."),
    Term(REENTERED, "", "A stage or step object was entered again while open. Not recorded."),
    Term(BACKLOG_FULL, "{frame}", "The relay did not keep up and the bounded buffer was full."),
    Term(TIMES_UNREADABLE, "{stage}", "The device's times could not be read. Host-timed instead."),
    Term(PING_UNANSWERED, "{ping}", "A device did not answer a look at its clock in time, or with an error."),
    Term(BAD_ATTRIBUTE, "{attribute}", "Not a string, number, flag or a list of one of these."),
    Term(BAD_LINK, "{link}", "An entry of `requests` that is neither a traceparent nor a span context."),
    Term(TOO_MANY_LINKS, "{link}", "More requests than a step can be linked to."),
    Term(BAD_FRAME, "{frame}", "A frame that the relay could not read, or one too large to send."),
    Term(INTERNAL_ERROR, "{error}", "A fault of otel-npu's own; the log has it."),
    Term(RELAY_LOST, "{relay}", "A relay ended early; what it held is lost. Another was started."),
    Term(QUEUE_FULL, "{span}", "The exporter did not keep up and the bounded queue was full."),
    Term(EXPORT_FAILED, "{span}", "The receiver refused the spans or could not be reached."),
)
