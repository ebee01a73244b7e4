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

    Made before vLLM takes in the output: it cuts the tokens behind a request's end off the very lists.

    Args:
        scheduler_output: The step's, with drafts.
        model_runner_output: What came of it.
        bonus_tokens: How many tokens each request gets beside the accepted ones.
    """

    def __init__(self, scheduler_output: Any, model_runner_output: Any, bonus_tokens: int) -> None:
        invalid: dict[str, int] = getattr(scheduler_output, "num_invalid_spec_tokens", None) or {}
        sampled: Any = model_runner_output.sampled_token_ids
        rows: dict[str, int] = model_runner_output.req_id_to_index
        self._counts: dict[str, tuple[int, int]] = {}
        for request_id, drafts in scheduler_output.scheduled_spec_decode_tokens.items():
            count = len(sampled[rows[request_id]]) if drafts and sampled and request_id in rows else 0
            if count:
                drafted = len(drafts) - invalid.get(request_id, 0)
                self._counts[request_id] = drafted, max(0, count - bonus_tokens)
        self.drafted = self.accepted = 0
        """Of all requests so far."""

    def take(self, request_id: str) -> tuple[int, int]:
        """How many tokens were drafted for a request that has an output, and how many of them accepted."""
        counts = self._counts.get(request_id, (0, 0))
        self.drafted += counts[0]
        self.accepted += counts[1]
        return counts
