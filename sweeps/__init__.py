"""Sweeps: which points an experiment has, what a trial does at one, and how Ray Tune runs them."""
