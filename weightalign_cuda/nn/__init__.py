"""Layers that replace torch.nn's, and the layers they fold to."""
