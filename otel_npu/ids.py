"""Random bytes for ids."""

from __future__ import annotations

import os
import random
from typing import TYPE_CHECKING, Final

from otel_npu.native import native

if TYPE_CHECKING:
    from collections.abc import Callable

# Of our own: a model's `random.seed()` must not repeat the ids. Not os.urandom() for each: it gives the GIL away, and
# in an engine another thread then takes it and keeps the scheduler waiting, for 150 us a step.
_random: Final = random.Random(os.urandom(32))  # noqa: S311
new_bytes: Callable[[int], bytes] = _random.randbytes if native is None else native.random_bytes
"""So many random bytes, for ids."""


def _seed() -> None:
    _random.seed(os.urandom(32))
    if native is not None:
        native.seed(os.urandom(32))


_seed()
os.register_at_fork(after_in_child=_seed)
