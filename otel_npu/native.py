"""The extension module `_native`, where it was built: the same as the Python beside it, several times as fast.

`OTEL_NPU_PURE_PYTHON=1` leaves it out, for tests of the Python and for whoever suspects it.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from otel_npu.settings import PURE_PYTHON

if TYPE_CHECKING:
    from types import ModuleType

native: ModuleType | Any = None

if os.environ.get(PURE_PYTHON, "") in ("", "0"):
    try:
        native = importlib.import_module("otel_npu._native")
    except ImportError:  # no compiler where it was installed
        native = None
