"""Hosts and scorers: the processes that hold frozen networks and answer requests about them."""
