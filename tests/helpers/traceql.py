"""Reads TraceQL, as Tempo 3 documents it: what a query names and finds, or why it is none."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeAlias

if TYPE_CHECKING:
    from tests.helpers.receiver import Span
    from tests.helpers.vllm_spans import Spans

INTRINSICS: Final = {
    *("duration", "name", "status", "statusMessage", "kind", "childCount"),
    *("rootName", "rootServiceName", "traceDuration"),
    *("span:status", "span:statusMessage", "span:duration", "span:name", "span:kind", "span:id", "span:parentID"),
    *("span:childCount", "trace:duration", "trace:rootName", "trace:rootService", "trace:id"),
    *("event:name", "event:timeSinceStart", "link:spanID", "link:traceID"),
    *("instrumentation:name", "instrumentation:version"),
}
AGGREGATES: Final = {"count", "avg", "max", "min", "sum"}
METRICS: Final = {
    *("rate", "count_over_time", "sum_over_time", "min_over_time", "max_over_time", "avg_over_time"),
    *("quantile_over_time", "histogram_over_time"),
}
_STAGES: Final = AGGREGATES | METRICS | {"by", "select", "coalesce", "compare"}
HINTS: Final = {"most_recent", "sample", "span_sample", "trace_sample"}
_WORDS: Final = {"true", "false", "nil", "ok", "error", "unset"}
_KINDS: Final = {"unspecified", "internal", "server", "client", "producer", "consumer"}
_SPANSET_OPERATORS: Final = {
    *("&&", "||", ">", ">>", "<", "<<", "~"),
    *("&>", "&>>", "&<", "&<<", "&~", "!>", "!>>", "!<", "!<<", "!~"),
}
_COMPARISONS: Final = {"=", "!=", ">", ">=", "<", "<="}
_BINDING: Final = {
    "||": 1,
    "&&": 2,
    **dict.fromkeys((*_COMPARISONS, "=~", "!~"), 3),
    "+": 4,
    "-": 4,
    "*": 5,
    "/": 5,
    "%": 5,
    "^": 6,
}
"""How closely an operator binds: the one with the larger number first."""
_COMPUTED: Final[dict[str, Callable[[Any, Any], Any]]] = {
    "=": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "%": operator.mod,
    "^": operator.pow,
    "=~": lambda value, pattern: re.fullmatch(pattern, value) is not None,
    "!~": lambda value, pattern: re.fullmatch(pattern, value) is None,
}
_NANOSECONDS: Final = {"ns": 1, "us": 1e3, "µs": 1e3, "ms": 1e6, "s": 1e9, "m": 60e9, "h": 3600e9}

_Value: TypeAlias = Callable[["Span"], Any]
_Finding: TypeAlias = Callable[["Spans"], "list[Span]"]

_TOKEN: Final = re.compile(
    r"""\s*(?:
        (?P<string>"(?:[^"\\]|\\.)*"|`[^`]*`)
      | (?P<duration>(?:\d+(?:\.\d+)?(?:ns|us|µs|ms|s|m|h))+)
      | (?P<number>\d*\.?\d+)
      | (?P<attribute>(?:(?:span|resource|event|link|instrumentation)\.|\.)[\w.-]*\w)
      | (?P<word>[A-Za-z_]\w*(?::[A-Za-z]+)?)
      | (?P<operator>&>>|&<<|!>>|!<<|&&|\|\||&>|&<|&~|!>|!<|!~|!=|>=|<=|=~|>>|<<|[={}()|,><~+\-*/%^!])
    )""",
    re.VERBOSE,
)


@dataclass(frozen=True)
class _Attribute:
    """An attribute as it is, nothing computed of it."""

    name: str

    def __call__(self, span: Span) -> Any:
        return _of(span, self.name)


@dataclass(frozen=True)
class _Constant:
    """What was written in the query."""

    constant: Any

    def __call__(self, _: Span) -> Any:
        return self.constant


class TraceQLError(ValueError):
    """The text is no TraceQL; the message says where it stops being."""


@dataclass
class Query:
    """What a query names.

    Attributes:
        attributes: Each attribute, with its scope.
        span_names: What `name` is compared with.
        metrics: Whether it makes a series in the place of spans.
        find: The spans that it finds, or whose values are in its series. Not of all that can be asked: only of what
            a page of ours asks.
    """

    attributes: set[str] = field(default_factory=set)
    span_names: set[str] = field(default_factory=set)
    metrics: bool = False
    find: _Finding = lambda spans: spans.all


def parse(text: str) -> Query:
    """Read a query.

    Raises:
        TraceQLError: It is none.
    """
    return _Parser(text).query()


class _Parser:
    def __init__(self, text: str) -> None:
        self._tokens = list(_tokens(text))
        self._at = 0
        self._query = Query()

    def query(self) -> Query:
        find = self._spansets()
        while self._take("|"):
            find = self._stage(find)
        if self._take("with"):
            self._list(self._hint)
        if self._at < len(self._tokens):
            raise self._error("the end")
        self._query.find = find
        return self._query

    def _spansets(self) -> _Finding:
        find = self._spanset()
        while self._peek() in _SPANSET_OPERATORS:
            relation = self._peek()
            self._at += 1
            find = _related(relation, find, self._spanset())
        return find

    def _spanset(self) -> _Finding:
        if self._take("("):
            find = self._spansets()
            self._expect(")")
            return find
        return _where(self._filter())

    def _filter(self) -> _Value:
        self._expect("{")
        if self._take("}"):
            return lambda _: True
        value = self._expression()
        self._expect("}")
        return value

    def _stage(self, find: _Finding) -> _Finding:
        """What is left of what was found before it."""
        if self._peek() == "{":
            return _among(find, self._filter())
        name = self._peek()
        wanted = ("topk", "bottomk") if self._query.metrics else _STAGES
        if name not in wanted:
            raise self._error(" or ".join(sorted(wanted)))
        self._at += 1
        if name in ("topk", "bottomk"):
            self._list(self._number)
            self._comparison()
        elif name in METRICS or name == "compare":
            return _among(find, self._metrics(name))
        else:
            self._list(self._field, empty=name in ("count", "coalesce"))
            if name in AGGREGATES and not self._comparison():
                raise self._error("a comparison")
        return find

    def _metrics(self, name: str) -> _Value:
        """What a span has that is in the series: the value that is put together or, to compare, that it is selected."""
        self._query.metrics = True
        there: _Value = lambda _: True  # noqa: E731
        self._expect("(")
        if name == "compare":
            there = self._filter()
            while self._take(","):
                self._number()
            self._expect(")")
            return there
        if name not in ("rate", "count_over_time"):
            value = self._field()
            there = lambda span: value(span) is not None  # noqa: E731
        while self._peek() == ",":
            if name != "quantile_over_time":
                raise self._error(")")
            self._at += 1
            self._number()
        self._expect(")")
        if self._take("by"):
            self._list(self._field)
        self._comparison()
        return there

    def _comparison(self) -> bool:
        """Whether there was one."""
        if self._peek() not in _COMPARISONS:
            return False
        self._at += 1
        self._number()
        return True

    def _expression(self, least: int = 1) -> _Value:
        """Operands, and what binds them at least so closely."""
        named, left = self._operand()
        while _BINDING.get(self._peek(), 0) >= least:
            sign = self._peek()
            self._at += 1
            if named and sign in ("=", "!=", "=~", "!~"):
                kind, text = self._token()
                if kind != "string":
                    raise self._error("a name in quotes")
                names = text[1:-1].split("|") if "~" in sign else [text[1:-1]]
                self._query.span_names.update(names)
            left, named = _computed(sign, left, self._expression(_BINDING[sign] + 1)), False
        return left

    def _operand(self) -> tuple[bool, _Value]:
        """Whether it was the span's name, and its value."""
        if self._take("!"):
            value = self._operand()[1]
            return False, lambda span: not value(span)
        if self._take("-"):
            value = self._operand()[1]
            if isinstance(value, _Constant):
                return False, _Constant(-value.constant)
            return False, lambda span: -value(span)
        if self._take("("):
            value = self._expression()
            self._expect(")")
            return False, value
        kind, text = self._token()
        if kind in ("string", "number", "duration") or text in _WORDS | _KINDS:
            self._at += 1
            return False, _Constant(_constant(kind, text))
        return text in ("name", "span:name"), self._field()

    def _field(self) -> _Value:
        kind, text = self._token()
        if kind == "attribute":
            self._query.attributes.add(text)
            self._at += 1
            return _Attribute(text)
        if kind != "word" or text not in INTRINSICS:
            raise self._error("an attribute or an intrinsic")
        self._at += 1
        return lambda span: _of(span, text)

    def _number(self) -> None:
        if self._token()[0] not in ("number", "duration"):
            raise self._error("a number")
        self._at += 1

    def _hint(self) -> None:
        if self._token()[1] not in HINTS:
            raise self._error("a hint")
        self._at += 1
        self._expect("=")
        if not (self._take("true") or self._take("false")):
            self._number()

    def _list(self, item: object, *, empty: bool = False) -> None:
        assert callable(item)
        self._expect("(")
        if empty and self._take(")"):
            return
        item()
        while self._take(","):
            item()
        self._expect(")")

    def _peek(self) -> str:
        return self._tokens[self._at][1] if self._at < len(self._tokens) else ""

    def _token(self) -> tuple[str, str]:
        return self._tokens[self._at] if self._at < len(self._tokens) else ("end", "")

    def _take(self, text: str) -> bool:
        taken = self._peek() == text
        self._at += taken
        return taken

    def _expect(self, text: str) -> None:
        if not self._take(text):
            raise self._error(text)

    def _error(self, wanted: str) -> TraceQLError:
        return TraceQLError(f"{wanted} is due in the place of {self._peek() or 'the end'}")


def _constant(kind: str, text: str) -> Any:
    if kind == "string":
        return text[1:-1]
    if kind == "duration":
        return sum(float(count) * _NANOSECONDS[unit] for count, unit in re.findall(r"([\d.]+)([a-zµ]+)", text))
    if kind == "number":
        return float(text) if "." in text else int(text)
    return {"true": True, "false": False, "nil": None}.get(text, text)


def _of(span: Span, text: str) -> Any:
    """An attribute or an intrinsic of a span; all of them where it may have several."""
    scope, dot, name = text.partition(".")
    if dot:
        return {"span": span.attributes, "resource": span.resource}[scope].get(name)
    known: dict[str, Callable[[], Any]] = {
        "name": lambda: span.name,
        "duration": lambda: span.duration_ns,
        "link:traceID": lambda: {trace_id for trace_id, _ in span.links},
    }
    return known[text.removeprefix("span:")]()


def _computed(sign: str, left: _Value, right: _Value) -> _Value:
    if sign == "&&":
        return lambda span: bool(left(span)) and bool(right(span))
    if sign == "||":
        return lambda span: bool(left(span)) or bool(right(span))

    # Tempo looks an attribute up among those of the number's own kind: 1 finds no 1.5, and 1.0 no 1.
    looked_up = sign in _COMPARISONS and {type(left), type(right)} == {_Attribute, _Constant}

    def value(span: Span) -> Any:
        one, other = left(span), right(span)
        if looked_up and {type(one), type(other)} == {int, float}:
            return None
        if sign == "!=" and other is None:
            return one is not None
        if isinstance(one, set):
            return any(_COMPUTED[sign](each, other) for each in one)
        try:
            return None if one is None or other is None else _COMPUTED[sign](one, other)
        except TypeError:  # a number beside a text: neither more nor less
            return None

    return value


def _where(value: _Value) -> _Finding:
    return lambda spans: [span for span in spans.all if value(span)]


def _among(find: _Finding, value: _Value) -> _Finding:
    return lambda spans: [span for span in find(spans) if value(span)]


def _related(relation: str, left: _Finding, right: _Finding) -> _Finding:
    """Those on the right that have what the relation says on the left."""

    def find(spans: Spans) -> list[Span]:
        around = {(span.trace_id, span.span_id) for span in left(spans)}
        return [span for span in right(spans) if around & above(spans, span)]

    def above(spans: Spans, span: Span) -> set[tuple[str, str]]:
        ids: set[tuple[str, str]] = set()
        parent = spans.parent(span)
        while parent is not None:
            ids.add((parent.trace_id, parent.span_id))
            parent = spans.parent(parent) if relation == ">>" else None
        return ids

    if relation not in (">", ">>"):
        return lambda _: []
    return find


def _tokens(text: str) -> list[tuple[str, str]]:
    tokens, at = [], 0
    while text[at:].strip():
        match = _TOKEN.match(text, at)
        if match is None:
            raise TraceQLError(f"no token begins with {text[at:].strip()[:20]!r}")
        kind = match.lastgroup or ""
        tokens.append((kind, match[kind]))
        at = match.end()
    return tokens
