"""Non-stationary solvers for diffusion and flow models: pure torch, no cluster.

from solvers import NSSolver
x1 = NSSolver.load("theta.json").sample(velocity, x0)
"""

from solvers.field import CountingField, FunctionField, VelocityField
from solvers.ns import InvalidThetaError, NSSolver, ThetaArtifact
from solvers.to_ns import to_ns

__all__ = [
    "CountingField",
    "FunctionField",
    "InvalidThetaError",
    "NSSolver",
    "ThetaArtifact",
    "VelocityField",
    "to_ns",
]
