"""Sweeps: the points of an experiment, the work of a trial, and running trials with Ray Tune."""
