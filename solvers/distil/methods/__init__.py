"""Distillation methods, one per file. A new file that defines ``METHOD`` is a new method."""
