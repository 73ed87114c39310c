"""Training of every network whose weights travel with the package. Hosts never train."""
