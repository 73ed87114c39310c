"""Training of all networks whose weights are shipped with the package. Hosts never train."""
