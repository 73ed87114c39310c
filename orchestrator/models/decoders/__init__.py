"""Decoders, one file each: what turns the latents that a model samples into something to look at or listen to."""
