"""Measurements: speed of the alignment against its rivals, and what alignment does for training."""
