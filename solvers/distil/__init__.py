"""Distillation: how theta is found. Each method asks an objective for losses and gradients, never a model."""
