"""The searches of `deploy/queries.md` name what is there, and are searches."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

import pytest

from otel_npu import semconv
from otel_npu.vllm import front_end, stages
from tests.helpers import REPOSITORY, traceql
from tests.helpers.command_line import otel_npu_command
from tests.helpers.queries import TEXT, blocks, found
from tests.helpers.receiver import Span
from tests.helpers.vllm_spans import Spans

if TYPE_CHECKING:
    from tests.helpers.receiver import Receiver

SPANS: Final = {
    *(term.name for term in semconv.SPANS if not term.name.startswith("<")),
    *(entry.name for entry in stages.STAGES.values() if entry.timing is not stages.IGNORED),
    front_end._LLM_REQUEST,
    *(f"{semconv.WORKER_STEP} rank {rank}" for rank in range(2)),
}
RESOURCE: Final = {
    *(semconv.SERVICE_NAME, semconv.SERVICE_INSTANCE_ID, semconv.PROCESS_PID, semconv.HOST_NAME),
    *(semconv.DEVICE_TYPE, semconv.DEVICE_NAME),
}
JAEGER_FIELDS: Final = {"Service", "Operation", "Tags", "Min Duration", "Max Duration"}


def defined(attribute: str, *, resource: bool = False) -> bool:
    """Whether the conventions have this attribute; what stands in angle brackets there is any name of its kind."""
    for term in semconv.ATTRIBUTES:
        if "<reason>" in term.name:
            names = [term.name.replace("<reason>", reason.name) for reason in semconv.DROP_REASONS]
        elif "<name>" in term.name:
            names = [term.name.replace("<name>", name) for name in SPANS]
        else:
            names = [term.name]
        if attribute in names:
            return resource == (term.name in RESOURCE)
    return False


@pytest.mark.parametrize("query", blocks("traceql"))
def test_a_traceql_query_names_only_spans_and_attributes_of_ours(query: str) -> None:
    found = traceql.parse(query)
    for name in found.span_names:
        assert any(re.fullmatch(name, known) for known in SPANS), name
    for attribute in found.attributes:
        scope, _, name = attribute.partition(".")
        assert scope in ("span", "resource"), f"{attribute}: a scope makes the search quick"
        assert defined(name, resource=scope == "resource"), attribute


@pytest.mark.parametrize("search", blocks("jaeger"))
def test_a_jaeger_search_names_only_spans_and_attributes_of_ours(search: str) -> None:
    fields = dict(line.split(": ", 1) for line in search.splitlines())
    assert set(fields) <= JAEGER_FIELDS
    assert fields["Operation"] in SPANS
    for tag in fields.get("Tags", "").split():
        name, equals, value = tag.partition("=")
        assert defined(name), name
        assert equals
        assert value
    for duration in ("Min Duration", "Max Duration"):
        assert re.fullmatch(r"\d+(\.\d+)?(us|ms|s|m|h)", fields.get(duration, "1s"))


@pytest.mark.slow
def test_of_the_demos_requests_each_query_finds_what_it_says(receiver: Receiver) -> None:
    """But for those about several ranks, which it has not, and about what hangs or gets lost, which nothing does."""
    done = otel_npu_command("demo", environment=receiver.grpc_environment)
    assert done.returncode == 0, done.stderr
    spans = Spans(receiver.spans)
    silent = [query for query in blocks("traceql") if not found(query, spans)]
    assert len(silent) == 5
    assert all(re.search(r"worker_step rank|unfinished_stage|npu\.dropped", query) for query in silent)
    [abort] = [query for query in blocks("traceql") if "abort" in query]
    assert [span.attributes[semconv.REQUEST_FINISH_REASON] for span in found(abort, spans)] == ["abort"]


@pytest.mark.parametrize(
    ("condition", "finds"),
    [
        ("span.npu.request.wait > 0.0", True),
        ("span.npu.request.wait > 0", False),
        ("span.npu.request.wait > -1", False),
        ("span.npu.request.wait * 1 > 0", True),
        ("span.npu.request.steps > 0", True),
        ("span.npu.request.steps > 0.5", False),
        ("span.npu.request.steps * 1 > 0.5", True),
    ],
)
def test_a_number_finds_only_those_of_its_own_kind_unless_it_is_computed(condition: str, finds: bool) -> None:
    """As Tempo 3.0.3 did when it was asked all of these."""
    attributes = {semconv.REQUEST_WAIT: 0.25, semconv.REQUEST_STEPS: 3}
    span = Span("decode", "t", "s", "", 0, 1, attributes, {}, "", [], [], 0, "", 1)
    assert bool(traceql.parse(f"{{ {condition} }}").find(Spans([span]))) == finds


def test_no_search_looks_back_further_than_the_tempo_of_the_compose_stack_lets_it() -> None:
    tempo = (REPOSITORY / "deploy/compose/tempo.yaml").read_text()
    [most_hours] = re.findall(r"max_duration: (\d+)h", tempo)
    hours = [int(count) for count in re.findall(r"last (\d+) hours", TEXT)]
    assert hours
    assert max(hours) < int(most_hours)  # what is asked a moment later is longer than what was meant


def test_every_question_has_a_search_for_both() -> None:
    for section in re.split(r"^## ", TEXT, flags=re.MULTILINE)[1:]:
        question = section.splitlines()[0]
        assert "```traceql" in section, question
        assert "```jaeger" in section, question


def test_the_questions_that_people_ask_are_answered() -> None:
    questions = re.findall(r"^## (.*)", TEXT, re.MULTILINE)
    for words in ("request slow", "stage grew", "device-bound", "rank straggles", "shared the slow step"):
        assert any(words in question for question in questions), words


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "{ } | rate()",
        "{ span.npu.rank = 0 && !(duration > 1.5s) } >> { name =~ `a|b` } | count() > 2",
        '({ name = "a" } && { status = error }) || { kind = server }',
        '{ name = "a" } &>> { span:duration > 10ms } | by(resource.service.name) | avg(duration) >= 20ms',
        "{ span.a.b-c != nil } | quantile_over_time(duration, 0.5, .9) by (name, span.x) > 1s | topk(10)",
        "{} | rate() by (name) | topk(10) > 5 with(sample=true)",
        "{ span.a * 1000 > span.b + -2 } | select(span.a, event:name)",
        '{ name = "a" } | compare({ status = error }, 10)',
    ],
)
def test_the_parser_takes_what_the_language_has(text: str) -> None:
    traceql.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "{ name = }",
        "{ name = x }",
        '{ nam = "x" }',
        '{ span:title = "x" }',
        "{ duration > 1w }",
        "{} | median_over_time(duration)",
        "{} | rate(duration)",
        "{} | avg_over_time()",
        "{} | avg_over_time(duration, 0.5)",
        "{} | count()",
        "{} | rate() | select(name)",
        "{} by (name)",
        "{} {}",
        "{} > name",
        "{ span. = 1 }",
        "{} with(fast=true)",
        '{ name = "x }',
    ],
)
def test_the_parser_refuses_what_the_language_has_not(text: str) -> None:
    with pytest.raises(traceql.TraceQLError):
        traceql.parse(text)


def test_the_parser_says_what_a_query_names() -> None:
    found = traceql.parse('{ name = "a" && span.b > 1 } > { name =~ "c|d" } | rate() by (resource.e)')
    assert found.span_names == {"a", "c", "d"}
    assert found.attributes == {"span.b", "resource.e"}
    assert found.metrics


def test_the_page_links_to_what_exists() -> None:
    targets = re.findall(r"\]\(([^)#:]+)\)", TEXT)
    assert targets
    assert all((REPOSITORY / "deploy" / target).exists() for target in targets)
