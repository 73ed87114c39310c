"""Speaker encoders: whose voice it is, as a vector."""
