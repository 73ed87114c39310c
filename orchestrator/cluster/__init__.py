"""The Ray cluster: connecting to it, and checks of its nodes and its launch file."""
