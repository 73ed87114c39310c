"""Figures of samples, one module per way of drawing them."""
