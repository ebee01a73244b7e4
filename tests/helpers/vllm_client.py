"""A client of the OpenAI API that does what clients do: streams, hangs up, sends trace headers, many at once."""

from __future__ import annotations

import http.client
import json
import os
from concurrent import futures
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

PATIENCE_SECONDS = 180


@dataclass(frozen=True)
class Caller:
    """A caller's span: what a request's traceparent names."""

    trace_id: str = field(default_factory=lambda: os.urandom(16).hex())
    span_id: str = field(default_factory=lambda: os.urandom(8).hex())

    def headers(self, flags: str = "01") -> dict[str, str]:
        """The headers of a request that this span makes."""
        return {"traceparent": f"00-{self.trace_id}-{self.span_id}-{flags}"}


class Client:
    """Asks one server; every call has a connection of its own."""

    def __init__(self, port: int) -> None:
        self._port = port

    def complete(
        self, prompt: str | list[str], headers: Mapping[str, str] | None = None, **options: Any
    ) -> dict[str, Any]:
        """The answer to a completion of 4 tokens, unless the options say otherwise."""
        return self._answer("/v1/completions", {"prompt": prompt, **options}, headers)

    def chat(self, content: str, headers: Mapping[str, str] | None = None, **options: Any) -> dict[str, Any]:
        """The answer to a chat of one message."""
        messages = [{"role": "user", "content": content}]
        return self._answer("/v1/chat/completions", {"messages": messages, **options}, headers)

    def stream(
        self, prompt: str, headers: Mapping[str, str] | None = None, *, hang_up_after: int | None = None, **options: Any
    ) -> int:
        """How many chunks a streamed completion had. `hang_up_after` so many the client is gone."""
        chunks = 0
        connection, response = self._ask("/v1/completions", {"prompt": prompt, "stream": True, **options}, headers)
        try:
            for line in response:
                chunks += line.startswith(b"data: {")
                if chunks == hang_up_after:
                    break
        finally:
            response.close()
            connection.close()
        return chunks

    def counted(self, name: str, suffix: str = "total") -> int:
        """What vLLM's own metric of this name has counted since it started, all its models and engines together."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=PATIENCE_SECONDS)
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
        connection.close()
        lines = [line for line in text.splitlines() if line.startswith(f"vllm:{name}_{suffix}{{")]
        assert lines, name
        return sum(int(float(line.split()[-1])) for line in lines)

    def _answer(self, path: str, body: dict[str, Any], headers: Mapping[str, str] | None) -> dict[str, Any]:
        connection, response = self._ask(path, body, headers)
        try:
            answer: dict[str, Any] = json.loads(response.read())
        finally:
            connection.close()
        return answer

    def _ask(
        self, path: str, body: dict[str, Any], headers: Mapping[str, str] | None
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        whole = {"model": "tiny", "max_tokens": 4, "temperature": 0, "ignore_eos": True, **body}
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=PATIENCE_SECONDS)
        connection.request("POST", path, json.dumps(whole), {"Content-Type": "application/json", **(headers or {})})
        response = connection.getresponse()
        assert response.status == 200, f"{response.status}: {response.read()[:2000]!r}"
        return connection, response


def at_once(calls: Iterable[Callable[[], Any]], concurrency: int) -> list[Any]:
    """What the calls give, so many of them at a time."""
    with futures.ThreadPoolExecutor(concurrency) as pool:
        return [running.result() for running in [pool.submit(call) for call in calls]]
