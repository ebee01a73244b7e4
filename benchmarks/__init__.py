"""What otel-npu costs and how exact it is, measured."""
