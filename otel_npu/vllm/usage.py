"""What a request got for nothing: prompt tokens found in a cache, and drafted tokens that were accepted."""

from __future__ import annotations

from typing import Any


def cached_tokens(request: Any) -> tuple[int, int]:
    """How many tokens of a request's prompt the engine's cache had, and how many came from elsewhere.

    Known when it is first scheduled.
    """
    stats = getattr(request, "prefill_stats", None)
    if stats is not None:
        return stats.num_local_cached_tokens, stats.num_external_cached_tokens
    elsewhere = max(0, getattr(request, "num_external_computed_tokens", 0))  # before vLLM 0.23
    return max(0, getattr(request, "num_cached_tokens", 0) - elsewhere), elsewhere


class Verified:
    """The drafts that a step verified, counted as vLLM's own metrics count them.

    Args:
        scheduler_output: The step's, with drafts.
        model_runner_output: What came of it.
        bonus_tokens: How many tokens each request gets beside the accepted ones.
    """

    def __init__(self, scheduler_output: Any, model_runner_output: Any, bonus_tokens: int) -> None:
        self._drafts: dict[str, Any] = scheduler_output.scheduled_spec_decode_tokens
        self._invalid: dict[str, int] = getattr(scheduler_output, "num_invalid_spec_tokens", None) or {}
        self._sampled: Any = model_runner_output.sampled_token_ids
        self._rows: dict[str, int] = model_runner_output.req_id_to_index
        self._bonus_tokens = bonus_tokens
        self.drafted = self.accepted = 0
        """Of all requests so far."""

    def take(self, request_id: str) -> tuple[int, int]:
        """How many tokens were drafted for a request that has an output, and how many of them accepted."""
        drafts = self._drafts.get(request_id)
        sampled = self._sampled[self._rows[request_id]] if drafts and self._sampled else ()
        if not len(sampled):  # a list, or an array
            return 0, 0
        drafted = len(drafts or ()) - self._invalid.get(request_id, 0)
        accepted = max(0, len(sampled) - self._bonus_tokens)
        self.drafted += drafted
        self.accepted += accepted
        return drafted, accepted
