#!/usr/bin/env bash
# vLLM's server with its requests and their stages traced: nothing but one flag and two variables.
#
#     examples/vllm_server.sh MODEL [what else `vllm serve` takes]
#
# Traces go to OTLP_ENDPOINT, by default a collector, Jaeger or Tempo on this machine.
set -euo pipefail

model=${1:?usage: vllm_server.sh MODEL [what else \`vllm serve\` takes]}
shift

export OTEL_NPU_ENABLED=1
export OTEL_SERVICE_NAME=${OTEL_SERVICE_NAME:-vllm}
exec vllm serve "$model" --otlp-traces-endpoint "${OTLP_ENDPOINT:-http://localhost:4317}" "$@"
