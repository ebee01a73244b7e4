"""What the documents name exists, and what exists is documented."""

from __future__ import annotations

import re

import pytest

from otel_npu import semconv, settings
from tests.helpers import REPOSITORY

DOCUMENTS = [
    *("README.md", "CHANGELOG.md", "deploy/README.md"),
    *(str(path.relative_to(REPOSITORY)) for path in sorted((REPOSITORY / "docs").glob("*.md"))),
]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_attribute_that_a_document_names_is_a_convention(document: str) -> None:
    named = set(re.findall(r"(?<![\w/])npu(?:\.[a-z_]+|\.<\w+>)+", (REPOSITORY / document).read_text()))
    assert named <= {term.name for term in (*semconv.ATTRIBUTES, *semconv.METRICS)}


def test_the_page_of_the_configuration_names_every_variable_of_ours_and_no_other() -> None:
    named = set(re.findall(r"OTEL_NPU_[A-Z_]+\b(?<!_)", (REPOSITORY / "docs/configuration.md").read_text()))
    ours = {value for value in vars(settings).values() if isinstance(value, str) and value.startswith("OTEL_NPU_")}
    # The session is between the processes of a tree; deploy/README.md tells who has to set it by hand.
    assert named == ours - {settings.SESSION}
    assert settings.SESSION in (REPOSITORY / "deploy/README.md").read_text()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_a_document_names_no_variable_of_ours_that_there_is_not(document: str) -> None:
    named = set(re.findall(r"\bOTEL_NPU_[A-Z_]+", (REPOSITORY / document).read_text()))
    assert named <= set(map(str, vars(settings).values()))


def test_the_readme_links_to_every_page() -> None:
    text = (REPOSITORY / "README.md").read_text()
    pages = [*(REPOSITORY / "docs").glob("*.md"), *(REPOSITORY / "deploy").glob("*.md")]
    assert [str(page) for page in pages if f"({page.relative_to(REPOSITORY)})" not in text] == []


def test_the_readme_takes_a_minute() -> None:
    text = re.sub(r"```.*?```", "", (REPOSITORY / "README.md").read_text(), flags=re.DOTALL)
    prose = [line for line in text.splitlines() if not line.startswith(("    ", "|", "!["))]
    assert len(" ".join(prose).split()) < 600


def test_every_file_the_documents_link_to_exists() -> None:
    for document in DOCUMENTS:
        path = REPOSITORY / document
        for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
            assert (path.parent / target).exists(), f"{document} links to {target}"
