"""The Ray cluster: connecting to it, checking its nodes, checking its launch file."""
