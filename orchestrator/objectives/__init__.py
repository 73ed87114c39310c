"""Objectives that a distillation minimises: one file each, named by its module."""
