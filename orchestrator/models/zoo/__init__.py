"""The zoo: small frozen models that travel with the package, trained by the project on real data."""

from orchestrator.models.zoo.adapter import ZooModel

ADAPTER = ZooModel

__all__ = ["ADAPTER", "ZooModel"]
