"""Solver families, one file each, found by module name."""

from solvers.families.base import Family, GridSolver, LearnableFamily

__all__ = ["Family", "GridSolver", "LearnableFamily"]
