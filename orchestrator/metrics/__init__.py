"""Metrics, one module each, loaded by module name."""
