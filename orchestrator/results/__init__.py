"""Results of sweep points, and the scoring of theta."""
