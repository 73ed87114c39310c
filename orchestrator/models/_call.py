"""The calling convention of a network: which argument takes the state, the time, the label, or a named condition."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

NAMED = "c."
"""Prefix of a named condition among the inputs of a network, beside x (the state), t (the time in the network's own
convention) and y (the label)."""


class Call(NamedTuple):
    """The calling convention of a network.

    Attributes:
        positional: Symbols of the positional arguments, in order.
        keywords: Symbol of each keyword argument, by argument name; ``name.entry`` for an entry of an argument that is
            a dictionary.
    """

    positional: tuple[str, ...]
    keywords: dict[str, str]

    @classmethod
    def parse(cls, text: str) -> Call:
        """Parse a text like ``"x, t, y"``, ``"sample=x, timestep=t"`` or ``"x, t, obs=c.obs, mask=c.mask"``.

        Entries of an argument that is a dictionary are ``"x, t, cond.obs=c.obs, cond.mask=c.mask"``.

        Raises:
            ValueError: The text is not a valid call.
        """
        positional: list[str] = []
        keywords: dict[str, str] = {}
        for part in (part.strip() for part in text.split(",")):
            name, equals, symbol = (piece.strip() for piece in part.partition("="))
            if not equals and not keywords:
                positional.append(name)
            elif equals and _is_argument(name) and name not in keywords:
                keywords[name] = symbol
            else:
                raise ValueError(f"call={text!r}: {part!r} is not valid here; write it like 'x, t, class_labels=y'")
        twice = next((name for name in keywords if any(other.startswith(f"{name}.") for other in keywords)), None)
        if twice is not None:
            raise ValueError(f"call={text!r} gives {twice} as a whole and by its entries; leave one out")
        symbols = [*positional, *keywords.values()]
        plain = [symbol for symbol in symbols if not _is_named(symbol)]
        if sorted(plain) not in (["t", "x"], ["t", "x", "y"]) or len(set(symbols)) < len(symbols):
            raise ValueError(
                f"call={text!r} must name x (the state) and t (the time) once each, and y (the label) and each named "
                f"condition, such as c.obs, at most once; write it like 'x, t', 'sample=x, timestep=t, class_labels=y' "
                f"or 'x, t, obs=c.obs'"
            )
        return cls(tuple(positional), keywords)

    @property
    def symbols(self) -> tuple[str, ...]:
        return (*self.positional, *self.keywords.values())

    @property
    def conditions(self) -> tuple[str, ...]:
        """Names of the conditions: ``("obs",)`` for ``c.obs``."""
        return tuple(symbol.removeprefix(NAMED) for symbol in self.symbols if _is_named(symbol))

    def arguments(self, values: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """Positional and keyword arguments, filled from the values by symbol."""
        named: dict[str, Any] = {}
        for name, symbol in self.keywords.items():
            argument, dot, entry = name.partition(".")
            if dot:
                named.setdefault(argument, {})[entry] = values[symbol]
            else:
                named[argument] = values[symbol]
        return [values[s] for s in self.positional], named


def _is_argument(name: str) -> bool:
    """Whether a text is the name of an argument, or ``name.entry``."""
    argument, dot, entry = name.partition(".")
    return argument.isidentifier() and (not dot or entry.isidentifier())


def _is_named(symbol: str) -> bool:
    return symbol.startswith(NAMED) and symbol.removeprefix(NAMED).isidentifier()
