"""Exporters: theta in the form that other programs read. One file each, found by module name."""
