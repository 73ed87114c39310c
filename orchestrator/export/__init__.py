"""Exporters: theta in the file formats of other programs. One module each, loaded by module name."""
