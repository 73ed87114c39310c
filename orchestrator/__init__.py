"""Distil fast solvers for frozen diffusion and flow models: the Python API, and the parts behind it.

``from orchestrator import Model, distil, sweep, evaluate, load_theta`` is all that a notebook needs. The names are
resolved when they are first used, so that ``import orchestrator`` itself loads nothing.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.api import Model as Model

__all__ = ["Model"]


def __getattr__(name: str) -> Any:
    """A name of :mod:`orchestrator.api`."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module("orchestrator.api"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
