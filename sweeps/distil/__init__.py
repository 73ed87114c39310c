"""One theta at the least cost: few pairs, a short race for the start, Levenberg-Marquardt on batches that grow."""
