"""Batch evaluation: solvers x datasets x metrics, measured shard by shard on hosts and scorers, then summarised."""
