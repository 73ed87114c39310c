"""Reads YAML as people mean it: a key twice is refused, and a number is a number however it is written.

PyYAML follows YAML 1.1, in which ``2e-3`` is text, ``010`` is 8, ``1:30`` is 90 and ``2026-11-28`` is a date. Here the
first is a number, as in YAML 1.2; the second is refused, since either reading may be meant; the others are text. So are
the keys ``null``, ``true`` and ``on``.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml
from yaml.constructor import ConstructorError
from yaml.nodes import MappingNode, Node, ScalarNode

FLOAT = re.compile(
    r"""^(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?
    |[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+
    |[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)
INT = re.compile(r"^[-+]?(?:0|[1-9][0-9_]*|0b[01_]+|0x[0-9a-fA-F_]+)$")
LEADING_ZERO = re.compile(r"^[-+]?0[0-9_]+$")
AMBIGUOUS = "!leading-zero"

NAMES = ("tag:yaml.org,2002:null", "tag:yaml.org,2002:bool")
"""What is text where it is a key: the option ``null``, or an argument called ``on``."""

REMEDIES = {
    "'\\t'": "indent with spaces, not with tabs",
    "mapping values are not allowed here": "put a text that contains ': ' in quotes",
    "that cannot start any token": "put a text that begins with a special character in quotes",
    "expected ',' or": "close the bracket, and put a text that contains brackets, commas or quotes in quotes",
}
"""What to do, by a part of PyYAML's message."""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the differences named above."""

    def construct_mapping(self, node: MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        lines: dict[Any, int] = {}
        for key_node, _ in node.value:
            if key_node.tag in NAMES:
                key_node.tag = "tag:yaml.org,2002:str"
            key = key_node.value if isinstance(key_node, ScalarNode) else None
            line = key_node.start_mark.line + 1
            if key is not None and (key_node.tag, key) in lines:
                first = lines[key_node.tag, key]
                raise ConstructorError(
                    None, None, f"the key {key!r} is also in line {first}; keep one of them", key_node.start_mark
                )
            lines[key_node.tag, key] = line
        return super().construct_mapping(node, deep)


def _refuse_leading_zero(loader: yaml.SafeLoader, node: Node) -> None:
    text = node.value
    digits = text.replace("_", "").lstrip("+-0") or "0"
    octal = f" or {int(digits, 8)}" if len(digits) > 1 and not set(digits) & set("89") else ""
    problem = f"{text} may be decimal or octal; write {digits}{octal}, or put it in quotes as text"
    raise ConstructorError(None, None, problem, node.start_mark)


_REPLACED = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+0123456789."))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", INT, list("-+0123456789"))
_Loader.add_implicit_resolver(AMBIGUOUS, LEADING_ZERO, list("-+0"))
_Loader.add_constructor(AMBIGUOUS, _refuse_leading_zero)


def parse_yaml(text: str) -> Any:
    """The content of a YAML document.

    Raises:
        ValueError: It is not YAML, has a key twice, or a number with a leading zero; names the line and the remedy.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        problem = str(error.problem or error.context)
        remedy = next((f"; {remedy}" for part, remedy in REMEDIES.items() if part in problem), "")
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}: " if mark is not None and "\n" in text.strip("\n") else ""
        raise ValueError(f"{line}{problem}{remedy}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(str(error).splitlines()[0]) from error
