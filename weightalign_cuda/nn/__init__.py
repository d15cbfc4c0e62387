"""Layers in place of torch.nn's, and what they fold to."""
