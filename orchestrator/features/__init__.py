"""Feature extractor plugins for Frechet distances and perceptual losses: one file each, named by its module."""
