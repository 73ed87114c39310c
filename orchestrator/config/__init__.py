"""The experiment configuration."""
