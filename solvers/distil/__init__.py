"""Distillation methods, which optimise theta. They call an objective for losses and gradients, never a model."""
