"""What must not be shown: values of OTLP headers, and passwords in endpoints."""

from __future__ import annotations

import logging
import os
import re
from typing import TYPE_CHECKING, Final
from urllib.parse import quote, unquote, urlsplit

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_MASK: Final = "***"
_CREDENTIALS: Final = re.compile(r"(?<=://)[^/\s'\"]+@")
_SHORTEST: Final = 4  # what is shorter is no secret, and its mask would hit numbers and words


def masked(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """The text without any secret that the environment holds, and without credentials in its URLs."""
    text = _CREDENTIALS.sub(f"{_MASK}@", text)
    for secret in sorted(set(_secrets(environment)), key=len, reverse=True):
        if len(secret) >= _SHORTEST:
            text = text.replace(secret, _MASK)
    return text


class MaskingFormatter(logging.Formatter):
    """Whatever a library quotes of its settings, in a message or a traceback, no secret reaches the log."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as text."""
        return masked(super().format(record))


def _secrets(environment: Mapping[str, str]) -> Iterator[str]:
    for variable, value in environment.items():
        if not variable.startswith("OTEL_"):
            continue
        if variable.endswith("_HEADERS"):
            for entry in value.split(","):
                name, equals, given = entry.partition("=")
                # Without an equals sign it may be the secret itself, put where its name belongs.
                yield from _forms(given if equals else name)
        elif variable.endswith("_ENDPOINT"):
            parts = urlsplit(value if "://" in value else f"//{value}")
            credentials, at, _ = parts.netloc.rpartition("@")
            if at:
                yield from _forms(credentials)
                yield from _forms(credentials.partition(":")[2])
            for pair in parts.query.split("&"):
                yield from _forms(pair.rpartition("=")[2])


def _forms(secret: str) -> Iterator[str]:
    """A secret as it is written, as it is sent, and without the word before it, as in `Bearer <token>`."""
    for form in (secret.strip(), unquote(secret).strip()):
        token = re.split(r" |%20", form)[-1]
        yield from (form, token, quote(token, safe=""))
