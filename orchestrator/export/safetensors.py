"""``safetensors``: exports theta as three tensors with provenance in the header, for ``solvers.load_theta``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save

from orchestrator.export.base import Exporter, check_artifact, write_file
from solvers.theta import ThetaArtifact
from solvers.theta_content import METADATA_KEY


@dataclass(frozen=True)
class Safetensors(Exporter):
    """Exports theta as one safetensors file: float64 tensors times, a and b, and provenance in the metadata.

    A theta for a range of guidance scales has the tensors upper_times, upper_a and upper_b as well.
    """

    name = "safetensors"

    def export(self, artifact: ThetaArtifact, destination: Path) -> list[Path]:
        """Write the file, whose name must end in .safetensors. See :meth:`Exporter.export`."""
        artifact = check_artifact(artifact)
        tensors = artifact.tensors()
        provenance = {key: value for key, value in json.loads(artifact.to_json()).items() if key not in tensors}
        data = save(
            {name: tensor.detach().contiguous() for name, tensor in tensors.items()},
            metadata={METADATA_KEY: json.dumps(provenance)},
        )
        return write_file(destination, ".safetensors", data)


EXPORTER = Safetensors
