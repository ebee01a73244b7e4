"""A service in front of vLLM, instrumented with OpenTelemetry: one trace from its caller down to the NPU's stages.

FastAPI's instrumentation makes a span of each call; httpx's makes one of the call to vLLM and sends its context along;
vLLM's `llm_request` is that span's child, and the stages are children of `llm_request`.

    examples/vllm_server.sh MODEL &
    python examples/fastapi_caller.py --vllm http://localhost:8000 --port 9000
    curl 'http://localhost:9000/complete?prompt=Hello'

Needs opentelemetry-instrumentation-fastapi and opentelemetry-instrumentation-httpx beside what vLLM brings. Where its
own spans go is said by the standard variables, such as OTEL_EXPORTER_OTLP_ENDPOINT.
"""

from __future__ import annotations

import argparse
import signal

import fastapi
import httpx
import uvicorn
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from opentelemetry.instrumentation.httpx import HTTPXClientInstrumentor
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor


def make_app(vllm: str) -> fastapi.FastAPI:
    """The service; `vllm` is the address of vLLM's server."""
    app = fastapi.FastAPI()
    client = httpx.AsyncClient(base_url=vllm, timeout=120)

    @app.get("/complete")
    async def complete(prompt: str, tokens: int = 16) -> str:
        """Complete a prompt."""
        models = (await client.get("/v1/models")).json()
        body = {"model": models["data"][0]["id"], "prompt": prompt, "max_tokens": tokens}
        answer = await client.post("/v1/completions", json=body)
        answer.raise_for_status()
        return str(answer.json()["choices"][0]["text"])

    FastAPIInstrumentor.instrument_app(app)
    return app


def main() -> None:
    """Serve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", default="http://localhost:8000")
    parser.add_argument("--port", type=int, default=9000)
    arguments = parser.parse_args()
    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    HTTPXClientInstrumentor().instrument()
    # When it is done uvicorn raises the signal again, which would end the process before the last spans have left.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        uvicorn.run(make_app(arguments.vllm), host="127.0.0.1", port=arguments.port)
    finally:
        provider.shutdown()


if __name__ == "__main__":
    main()
