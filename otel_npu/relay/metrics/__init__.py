"""Metrics of every step, and of the relay itself: counted here, read and exported by the OpenTelemetry SDK."""
