"""Points of a sweep: Tune's trial processes, and the runners that compute the results."""
