"""How URIs are shown: without user, password, keys, tokens and connection options.

Every error of the program (:class:`orchestrator.errors.UserError`) and everything that is written to reports, runs and
logs passes through here, because all of them are read by other people than the one who holds the password.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_URI = re.compile(
    r"""(?<![\w+.-])(?!(?:sqlite|file):)[A-Za-z][\w+.-]*://(?:[^\s@]*@)?[^\s'"<>`]*[^\s'"<>`;,.:!?)\]}…]"""
)
"""A URI in a text, without the punctuation that follows it. Files hold no secrets in their names."""

_SECRET_KEY = re.compile(r"(?:.*_)?(?:password|passwd|secret|token|api_?key|access_key|secret_key|credentials?)", re.I)
HIDDEN = "…"


def shown(uri: str) -> str:
    """A URI for display: scheme, host, port and path. Paths, and URIs of files and SQLite stores, stay as they are."""
    scheme, separator, rest = uri.partition("://")
    if not separator or scheme.lower() in ("file", "sqlite"):
        return uri
    authority = re.match(r"[^/?#]*", rest)[0]  # type: ignore[index]  # the pattern matches any text
    if "@" in authority:
        rest = rest.removeprefix(authority.rpartition("@")[0] + "@")
    elif "@" in rest and re.search(r":(?!\d*$)", re.sub(r"\[.*?\]", "", authority)):
        rest = rest.rpartition("@")[2]  # a password with '/', '?' or '#' that is not percent-encoded
    return scheme + separator + re.split(r"[?#]", rest, maxsplit=1)[0]


def without_secrets(text: str) -> str:
    """A text with every URI in it as :func:`shown` writes it."""
    return _URI.sub(lambda match: shown(match[0]), text) if "://" in text else text


def values_without_secrets(value: Any) -> Any:
    """A configuration for display: URIs as :func:`shown` writes them, and no values of keys such as ``api_key``."""
    if isinstance(value, str):
        return without_secrets(value)
    if isinstance(value, Mapping):
        return {
            key: HIDDEN
            if isinstance(inner, str) and inner and _SECRET_KEY.fullmatch(str(key))
            else values_without_secrets(inner)
            for key, inner in value.items()
        }
    return [values_without_secrets(inner) for inner in value] if isinstance(value, list | tuple) else value
