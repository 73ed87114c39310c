"""Decoder plugins, one module each: networks that turn a latent model's samples into images or sound."""
