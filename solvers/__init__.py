"""Non-stationary solvers for diffusion and flow models, in pure torch and without a cluster.

from solvers import load_theta
x1 = load_theta("theta.json").solver.sample(velocity, x0)
"""

from solvers.field import CountingField, FunctionField, VelocityField
from solvers.ns import InvalidThetaError, NSSolver
from solvers.theta import ThetaArtifact, load_theta
from solvers.to_ns import to_ns

__all__ = [
    "CountingField",
    "FunctionField",
    "InvalidThetaError",
    "NSSolver",
    "ThetaArtifact",
    "VelocityField",
    "load_theta",
    "to_ns",
]
