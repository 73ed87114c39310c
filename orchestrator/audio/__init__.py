"""Sound to log-mel frames and back, and the networks that listen to it."""
