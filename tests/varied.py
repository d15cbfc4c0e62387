"""Models whose layers all have different parameters, none of them the defaults, so that mixing up or dropping one
shows."""

import torch
from torch import nn

import weightalign_cuda as wa
from weightalign_cuda.layers import Aligned, aligned_layers


def numbers(count):
    """eps and scale for each weight of a list."""
    return {
        "eps": [0.1 + 1.9 * i / count for i in range(count)],
        "scale": [1.7 - 1.3 * i / count for i in range(count)],
    }


def vary(model):
    """Gives each layer its own eps and scale, and each gain its own values; returns the model."""
    layers, gains = aligned_layers(model.modules()), wa.gain_parameters(model)
    for layer, eps, scale in zip(layers, *numbers(len(layers)).values(), strict=True):
        layer.eps, layer.scale = eps, scale
    with torch.no_grad():
        for i, gain in enumerate(gains):
            gain.copy_(torch.linspace(0.6, 1.4, len(gain)) + 0.1 * i)
    return model


def converted(model, **options):
    return vary(wa.convert(model, **options))


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Sequential(nn.Conv2d(8, 8, 3, groups=2, bias=False), nn.ConvTranspose2d(8, 6, 2, stride=2)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 5),
    )


def names_of_aligned(model):
    return [name for name, module in model.named_modules() if isinstance(module, Aligned)]
