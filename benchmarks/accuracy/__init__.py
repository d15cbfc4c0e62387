"""python -m benchmarks accuracy: the paper's experiments on real images, their records and their report."""
