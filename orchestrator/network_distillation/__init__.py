"""Distillation of the *network*: baselines for comparison with distillation of the solver.

Separate tasks train copies of a zoo model's network; hosts never train. This package does not import Ray.
"""
