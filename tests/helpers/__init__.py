"""What tests share: receivers, programs of their own, frames, a real vLLM, the simulated Ascend runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Final

REPOSITORY: Final = Path(__file__).parents[2]
