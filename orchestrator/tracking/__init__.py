"""Experiments in MLflow."""
