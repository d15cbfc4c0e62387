"""Whole models: which layers are converted, what aligns them together, and what they fold to."""
