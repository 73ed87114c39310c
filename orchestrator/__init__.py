"""Distil fast solvers for frozen diffusion and flow models: the Python API, and the parts behind it.

``from orchestrator import Model, distil, sweep, evaluate, load_theta`` is all that a notebook needs. The names are
resolved when they are first used, so that ``import orchestrator`` itself loads nothing.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.api import Model as Model
    from orchestrator.api import Solver as Solver
    from orchestrator.api import distil as distil
    from orchestrator.api import evaluate as evaluate
    from orchestrator.api import load_theta as load_theta
    from orchestrator.api import sweep as sweep

__all__ = ["Model", "Solver", "distil", "evaluate", "load_theta", "sweep"]


def __getattr__(name: str) -> Any:
    """A name of :mod:`orchestrator.api`."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module("orchestrator.api"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
