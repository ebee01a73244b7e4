"""vLLM without a server: prompts in, text out, and a trace of each request with its stages.

Runs on an NPU with vllm-ascend, and on the CPU with vLLM's CPU build.

    OTEL_NPU_ENABLED=1 python examples/offline_inference_npu.py --model MODEL --otlp-endpoint http://localhost:4317
"""

from __future__ import annotations

import argparse

import otel_npu

PROMPTS = ("The capital of France is", "A transformer consists of", "To trace a request is to")


def main() -> None:
    """Complete the prompts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--otlp-endpoint", default="http://localhost:4317")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--max-model-len", type=int, default=None)
    parser.add_argument("--enforce-eager", action="store_true")
    arguments = parser.parse_args()

    from vllm import LLM, SamplingParams  # late: the plugin is loaded by it, and workers import this file

    llm = LLM(
        model=arguments.model,
        max_model_len=arguments.max_model_len,
        enforce_eager=arguments.enforce_eager,
        otlp_traces_endpoint=arguments.otlp_endpoint,
        disable_log_stats=False,  # vLLM makes its span of a request from them
    )
    for output in llm.generate(PROMPTS, SamplingParams(max_tokens=arguments.tokens, temperature=0.0)):
        print(f"{output.prompt!r} -> {output.outputs[0].text!r}")
    if not otel_npu.flush(5):
        print("not all spans could be exported")


if __name__ == "__main__":
    main()
