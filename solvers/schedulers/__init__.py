"""Noise schedules of Gaussian probability paths: alpha and sigma with their derivatives, and the inverse of the SNR."""

from solvers.schedulers.base import PathPoint, Scheduler, as_time
from solvers.schedulers.cond_ot import CondOT
from solvers.schedulers.cosine import Cosine
from solvers.schedulers.custom import Custom
from solvers.schedulers.discrete_vp import DiscreteVP
from solvers.schedulers.edm import EDM
from solvers.schedulers.vp import VP

__all__ = ["EDM", "VP", "CondOT", "Cosine", "Custom", "DiscreteVP", "PathPoint", "Scheduler", "as_time"]
