"""Points of a sweep: Tune's trial processes, and the runners that take points to their results."""
