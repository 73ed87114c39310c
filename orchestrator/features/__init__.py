"""Feature extractors, for Frechet distances and perceptual losses: one file each, found by module name."""
