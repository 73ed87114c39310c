"""The examination of a teacher: a few measurements of the frozen model, and the detectors that read them."""
