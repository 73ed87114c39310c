"""Speaker encoder plugins: from sound to a vector that identifies the voice."""
