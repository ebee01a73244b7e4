"""The pages under `docs/` that are generated are what they are generated from."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Final

from docs import semantic_conventions
from otel_npu import semconv
from tests.helpers import REPOSITORY

PAGE: Final = REPOSITORY / "docs/semantic-conventions.md"


def test_the_page_of_the_conventions_is_in_step_with_them() -> None:
    command = [sys.executable, "-m", "docs.semantic_conventions"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=200)
    assert PAGE.read_text() == done.stdout, (
        "make it anew: python -m docs.semantic_conventions >docs/semantic-conventions.md"
    )


def test_every_term_is_on_the_page_once_with_its_unit_and_meaning() -> None:
    rows = re.findall(r"^\| `([^`]+)` \|(?: (?:`([^`]*)`)? ?\|)? (.+) \|$", semantic_conventions.page(), re.MULTILINE)
    terms = [*semconv.SPANS, *semconv.EVENTS, *semconv.ATTRIBUTES, *semconv.DROP_REASONS]
    for term in terms:
        assert rows.count((term.name, term.unit, term.meaning)) == 1, term.name


def test_every_name_has_a_meaning() -> None:
    terms = [*semconv.SPANS, *semconv.EVENTS, *semconv.ATTRIBUTES, *semconv.DROP_REASONS]
    assert len({term.name for term in semconv.ATTRIBUTES}) == len(semconv.ATTRIBUTES)
    for term in terms:
        assert term.meaning.endswith((".", "!")), term.name
