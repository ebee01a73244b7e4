"""Statements about what otel-npu does."""
