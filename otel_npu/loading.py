"""Modules that come in late are imported under this lock, so that a process never forks in the midst of it.

A forked child has the import locks that other threads of its parent held, and nobody to release them: what such a
thread was importing could never be imported in the child.
"""

from __future__ import annotations

import os
import threading
from typing import Final

lock: Final = threading.RLock()

os.register_at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release)
