"""Reads TraceQL, as Tempo 3 documents it: what a query names, or why it is none."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Final

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
_FIELD_OPERATORS: Final = {*_COMPARISONS, "=~", "!~", "&&", "||", "+", "-", "*", "/", "%", "^"}

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


class TraceQLError(ValueError):
    """The text is no TraceQL; the message says where it stops being."""


@dataclass
class Query:
    """What a query names.

    Attributes:
        attributes: Each attribute, with its scope.
        span_names: What `name` is compared with.
        metrics: Whether it makes a series in the place of spans.
    """

    attributes: set[str] = field(default_factory=set)
    span_names: set[str] = field(default_factory=set)
    metrics: bool = False


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
        self._spansets()
        while self._take("|"):
            self._stage()
        if self._take("with"):
            self._list(self._hint)
        if self._at < len(self._tokens):
            raise self._error("the end")
        return self._query

    def _spansets(self) -> None:
        self._spanset()
        while self._peek() in _SPANSET_OPERATORS:
            self._at += 1
            self._spanset()

    def _spanset(self) -> None:
        if self._take("("):
            self._spansets()
            self._expect(")")
            return
        self._filter()

    def _filter(self) -> None:
        self._expect("{")
        if not self._take("}"):
            self._expression()
            self._expect("}")

    def _stage(self) -> None:
        if self._peek() == "{":
            self._filter()
            return
        name = self._peek()
        wanted = ("topk", "bottomk") if self._query.metrics else _STAGES
        if name not in wanted:
            raise self._error(" or ".join(sorted(wanted)))
        self._at += 1
        if name in ("topk", "bottomk"):
            self._list(self._number)
            self._comparison()
        elif name in METRICS or name == "compare":
            self._metrics(name)
        else:
            self._list(self._field, empty=name in ("count", "coalesce"))
            if name in AGGREGATES and not self._comparison():
                raise self._error("a comparison")

    def _metrics(self, name: str) -> None:
        self._query.metrics = True
        if name == "compare":
            self._expect("(")
            self._filter()
            while self._take(","):
                self._number()
            self._expect(")")
            return
        self._expect("(")
        if name not in ("rate", "count_over_time"):
            self._field()
        while self._peek() == ",":
            if name != "quantile_over_time":
                raise self._error(")")
            self._at += 1
            self._number()
        self._expect(")")
        if self._take("by"):
            self._list(self._field)
        self._comparison()

    def _comparison(self) -> bool:
        """Whether there was one."""
        if self._peek() not in _COMPARISONS:
            return False
        self._at += 1
        self._number()
        return True

    def _expression(self) -> None:
        while True:
            named = self._operand()
            operator = self._peek()
            if operator not in _FIELD_OPERATORS:
                return
            self._at += 1
            if named and operator in ("=", "!=", "=~", "!~"):
                kind, text = self._token()
                if kind != "string":
                    raise self._error("a name in quotes")
                names = text[1:-1].split("|") if "~" in operator else [text[1:-1]]
                self._query.span_names.update(names)

    def _operand(self) -> bool:
        """Whether it was the span's name."""
        while self._take("!") or self._take("-"):
            pass
        if self._take("("):
            self._expression()
            self._expect(")")
            return False
        kind, text = self._token()
        if kind in ("string", "number", "duration") or text in _WORDS | _KINDS:
            self._at += 1
            return False
        self._field()
        return text in ("name", "span:name")

    def _field(self) -> None:
        kind, text = self._token()
        if kind == "attribute":
            self._query.attributes.add(text)
        elif kind != "word" or text not in INTRINSICS:
            raise self._error("an attribute or an intrinsic")
        self._at += 1

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
