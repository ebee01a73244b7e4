"""KV connectors for vLLM on a CPU: its own example, which loads inside a step, made to load while requests wait."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.example_connector import ExampleConnector, ExampleConnectorMetadata

if TYPE_CHECKING:
    from collections.abc import Iterable

_ROLE: Final = KVConnectorRole.WORKER


class WaitingConnector(ExampleConnector):  # type: ignore[misc]
    """Finds what vLLM's example does, but the request waits for it, as with the connectors of clusters. No data comes.

    `kv_connector_extra_config` says how: `load_seconds` is how long a fetch takes, `fail` whether it fails, and
    `keep_seconds` for how long a finished request's blocks are kept for somebody else.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        extra = self._kv_transfer_config.get_from_extra_config
        self._load_seconds = float(extra("load_seconds", 0.3))
        self._keep_seconds = float(extra("keep_seconds", 0))
        self._fails = bool(extra("fail", False))
        self._arrives: dict[str, float] = {}
        self._freed: dict[str, float] = {}
        self._failed_blocks: set[int] = set()
        self._begun: list[tuple[str, list[int]]] = []
        self._kept: list[str] = []
        self._tried: set[str] = set()

    # In the scheduler.

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        if request.request_id in self._tried:  # what failed once is computed
            return 0, False
        count, _ = super().get_num_new_matched_tokens(request, num_computed_tokens)
        return count, bool(count)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if num_external_tokens > 0:
            self._tried.add(request.request_id)
            self._begun.append((request.request_id, blocks.get_block_ids()[0]))

    def build_connector_meta(self, scheduler_output: Any) -> Any:
        meta = super().build_connector_meta(scheduler_output)
        assert isinstance(meta, ExampleConnectorMetadata)
        vars(meta).update(begun=self._begun, kept=self._kept)
        self._begun, self._kept = [], []
        return meta

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        if not self._keep_seconds:
            return False, None
        self._kept.append(request.request_id)
        return True, None

    # In the worker.

    def bind_connector_metadata(self, connector_metadata: Any) -> None:
        super().bind_connector_metadata(connector_metadata)
        now = time.monotonic()
        for request_id, block_ids in connector_metadata.begun:
            self._arrives[request_id] = now + self._load_seconds
            self._failed_blocks.update(block_ids if self._fails else ())
        self._freed.update((request_id, now + self._keep_seconds) for request_id in connector_metadata.kept)

    def get_finished(self, finished_req_ids: Iterable[str]) -> tuple[set[str] | None, set[str] | None]:
        return self._over(self._freed), self._over(self._arrives)

    def get_block_ids_with_load_errors(self) -> set[int]:
        if self._arrives:
            return set()  # not before it is over
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    @staticmethod
    def _over(when: dict[str, float]) -> set[str] | None:
        over = {request_id for request_id, at in when.items() if at <= time.monotonic()}
        for request_id in over:
            del when[request_id]
        return over or None
