"""Recognisers: what was understood of sound."""
