"""`otel-npu doctor`: what tracing needs, checked one by one, with the cure beside what is wrong. Changes nothing."""
