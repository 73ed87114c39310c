"""The Python API: models of this process or of files, distillation, comparison, sampling and export."""

from orchestrator.api.distilling import distil
from orchestrator.api.jobs import evaluate, sweep
from orchestrator.api.model import Model
from orchestrator.api.solver import Solver, load_theta

__all__ = ["Model", "Solver", "distil", "evaluate", "load_theta", "sweep"]
