"""The Python API: models of this process or of files, distillation, comparison, sampling and export."""

from orchestrator.api.model import Model

__all__ = ["Model"]
