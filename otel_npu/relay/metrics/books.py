"""What is counted for one reader: of each service all metrics. Nothing of OpenTelemetry: reading begins before it."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from otel_npu import semconv
from otel_npu.relay.metrics.series import Family

if TYPE_CHECKING:
    from otel_npu.relay.metrics.plans import Plan
    from otel_npu.relay.metrics.series import Key, Names
    from otel_npu.wire.frames import Hello


class Shelf:
    """All that one reader is to get. Hold `lock` to count.

    Args:
        plan: What the reader wants.
        names: Bounds what comes from outside.
    """

    def __init__(self, plan: Plan, names: Names) -> None:
        self.plan = plan
        self.names = names
        self.lock = threading.Lock()
        self.books: list[Book] = []

    def book(self, hello: Hello, instance_id: str) -> Book:
        """A new one, for a service that there is none of yet."""
        book = Book(hello, instance_id, self)
        with self.lock:
            self.books.append(book)
        return book


class Book:
    """All metrics of one service.

    Args:
        hello: Its first process.
        instance_id: Of the service as this relay has it.
        shelf: Where it stands.
    """

    def __init__(self, hello: Hello, instance_id: str, shelf: Shelf) -> None:
        self.hello = hello
        self.instance_id = instance_id
        self.lock = shelf.lock
        self.rows: dict[Key, tuple[Any, ...]] = {}
        """Series that are always counted together, by the key of the first."""
        self.families = {metric: Family(metric, shelf.names, shelf.plan.exponential) for metric in semconv.METRICS}
