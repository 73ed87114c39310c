"""Distillation of the *network*: the baselines that distillation of the solver is measured against.

Tasks of their own, which train copies of a zoo model's network; hosts never train. Knows nothing of Ray.
"""
