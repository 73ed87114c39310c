"""Model adapters, one file each, found by module name."""
