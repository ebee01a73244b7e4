"""The KV cache that an engine fetches from elsewhere or keeps for somebody else, told to the relay."""

from __future__ import annotations

import functools
import logging
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, Final

from otel_npu.vllm import tracing
from otel_npu.wire import frames

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from otel_npu.capture.recorder import Recorder

_log = logging.getLogger("otel_npu")

_WAITING: Final = "WAITING_FOR_REMOTE_KVS"


class TransferLog:
    """Follows the KV connector of one engine's scheduler.

    Args:
        scheduler: The scheduler. Methods are wrapped on it and on its connector, whose classes may be anybody's.
        number_of: The number of a request by its id; None of one that is not sampled.
        recorder: This process's recorder, if tracing is on.
    """

    def __init__(
        self, scheduler: Any, number_of: Callable[[str], int | None], recorder: Callable[[], Recorder | None]
    ) -> None:
        connector = scheduler.connector
        self._name = type(connector).__name__
        self._number_of = number_of
        self._recorder = recorder
        self._failed_ids: Any = getattr(scheduler, "failed_recving_kv_req_ids", ())
        self._allocated: list[tuple[Any, int, int]] = []
        """Requests that got blocks for tokens from elsewhere in this scheduling, how many, and when."""
        self._sending: dict[str, int] = {}
        for owner, name, before, after in (
            (connector, "update_state_after_alloc", None, self._after_alloc),
            (connector, "update_connector_output", self._moved, None),
            (connector, "request_finished", None, self._finished),
            (connector, "request_finished_all_groups", None, self._finished),
            (scheduler, "_handle_invalid_blocks", None, self._failed),
            (scheduler, "_handle_failed_recving", None, self._failed),
        ):
            method = getattr(owner, name, None)
            if callable(method):
                setattr(owner, name, _beside(method, before, after))

    def scheduled(self) -> None:
        """A scheduling is over: which of the loads run on while their requests wait."""
        if not self._allocated:
            return
        allocated, self._allocated = self._allocated, []
        numbers: list[int] = []
        tokens: list[int] = []
        for request, count, _ in allocated:
            # Else the step that was scheduled loads by itself: that is a stage of the worker's.
            if getattr(request.status, "name", "") == _WAITING:
                number = self._number_of(request.request_id)
                if number is not None:
                    numbers.append(number)
                    tokens.append(count)
        if numbers:
            self._send(allocated[0][2], loading=numbers, tokens=tokens)

    def _after_alloc(self, _: Any, request: Any, _blocks: Any, num_external_tokens: int) -> None:
        if num_external_tokens > 0:
            self._allocated.append((request, num_external_tokens, perf_counter_ns()))

    def _moved(self, connector_output: Any) -> None:
        """Workers say that transfers are over; called after the scheduler has looked for those that failed."""
        received, sent = connector_output.finished_recving, connector_output.finished_sending
        if not received and not sent:
            return
        freed = [self._sending.pop(request_id, None) for request_id in sent or ()]
        received = received or ()
        self._send(
            perf_counter_ns(),
            loaded=self._numbers(received),
            failed=self._numbers(request_id for request_id in received if request_id in self._failed_ids),
            sent=[number for number in freed if number is not None],
        )

    def _finished(self, result: Any, request: Any, *_: Any) -> None:
        """A request is over; where its blocks are kept, somebody else is to fetch them."""
        number = self._number_of(request.request_id)
        if number is not None and isinstance(result, tuple) and result[0]:
            self._sending[request.request_id] = number
            self._send(perf_counter_ns(), sending=[number])

    def _failed(self, request_ids: Any, *_: Any) -> None:
        """These requests don't get what was to be loaded for them."""
        if request_ids:
            self._send(perf_counter_ns(), failed=self._numbers(request_ids))

    def _numbers(self, request_ids: Iterable[str]) -> list[int]:
        numbers = [self._number_of(request_id) for request_id in request_ids]
        return [number for number in numbers if number is not None]

    def _send(self, at_ns: int, **lists: list[int]) -> None:
        recorder = self._recorder()
        if recorder is not None and any(lists.values()):
            recorder.send(frames.Transfers(self._name, at_ns, **lists))


def _beside(
    method: Callable[..., Any], before: Callable[..., None] | None, after: Callable[..., None] | None
) -> Callable[..., Any]:
    """A method with another called before it with its arguments, or after it with its result and arguments."""
    first = None if before is None else tracing.guarded(before)
    then = None if after is None else tracing.guarded(after)

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        if first is not None:
            first(*args, **kwargs)
        result = method(*args, **kwargs)
        if then is not None:
            then(result, *args, **kwargs)
        return result

    return call
