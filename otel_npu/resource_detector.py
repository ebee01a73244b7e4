"""What OpenTelemetry's SDK can say about the host's NPUs: `OTEL_EXPERIMENTAL_RESOURCE_DETECTORS=npu`."""

from __future__ import annotations

from opentelemetry.sdk.resources import Resource, ResourceDetector

from otel_npu import host, semconv


class NpuResourceDetector(ResourceDetector):
    """The NPUs of the host as a resource's attributes; an empty resource where there are none. Never raises."""

    def __init__(self) -> None:
        super().__init__(raise_on_error=False)

    def detect(self) -> Resource:
        """Read a few small files."""
        try:
            npus = host.npus()
            if not npus:
                return Resource.get_empty()
            attributes = {
                semconv.HW_ID: ",".join(npus),
                semconv.HW_TYPE: semconv.HW_TYPE_NPU,
                semconv.HW_NAME: host.npu_model(),
                semconv.HW_DRIVER_VERSION: host.driver_version(),
                semconv.CANN_VERSION: host.cann_version(),
            }
        except Exception:  # a program must not fail for what is nice to know
            return Resource.get_empty()
        return Resource({name: value for name, value in attributes.items() if value})
