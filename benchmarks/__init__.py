"""Benchmarks: the speed of alignment against its rivals, and its effect on training."""
