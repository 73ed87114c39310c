"""Noise schedules of Gaussian probability paths: alpha, sigma, their derivatives and their inverse."""

from solvers.schedulers.base import PathPoint, Scheduler, as_time
from solvers.schedulers.cond_ot import CondOT
from solvers.schedulers.cosine import Cosine
from solvers.schedulers.vp import VP

__all__ = ["VP", "CondOT", "Cosine", "PathPoint", "Scheduler", "as_time"]
