"""Frozen networks' weights: shipped with the package, on this machine, or published in transformers' format."""
