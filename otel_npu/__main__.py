"""`python -m otel_npu` is `otel-npu`, for where that is not on the path."""

from otel_npu.cli import main

main()
