"""Conditioning sources and reference sets, one file each, found by module name."""
