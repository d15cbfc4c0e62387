"""The variance of activations at each depth: of what enters each ReLU, over all images, positions and channels."""

import copy

import torch
from torch import Tensor, nn


@torch.no_grad()
def activation_variance(model: nn.Module, images: Tensor) -> list[float]:
    """In a copy of the model that is in training mode, since batch norm normalises by the images' own statistics there.
    Four digits: the log is to stay small."""
    found: list[float] = []

    def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found.append(float(f"{inputs[0].double().var():.4g}"))

    model = copy.deepcopy(model).train()
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_pre_hook(note)
    model(images)
    return found
