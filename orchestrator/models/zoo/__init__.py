"""The zoo: small frozen models shipped with the package, trained by this project on real data."""

from orchestrator.models.zoo.adapter import ZooModel

ADAPTER = ZooModel

__all__ = ["ADAPTER", "ZooModel"]
