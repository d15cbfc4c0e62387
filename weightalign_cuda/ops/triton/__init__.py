"""The ops by Triton's kernels. Nothing here is imported before Triton serves."""
