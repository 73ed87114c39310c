"""Solver families: one file each, named by its module."""

from solvers.families.base import Family, GridSolver, LearnableFamily

__all__ = ["Family", "GridSolver", "LearnableFamily"]
