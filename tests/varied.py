"""Numbers all different from each other and from the defaults, so that what mixes them up, or drops them, is seen."""

import torch

import weightalign_cuda as wa
from weightalign_cuda.layers import aligned_layers


def numbers(count):
    """eps and scale for each of a list of weights."""
    return {
        "eps": [0.1 + 1.9 * i / count for i in range(count)],
        "scale": [1.7 - 1.3 * i / count for i in range(count)],
    }


def vary(model):
    """The model, each layer with an eps and a scale of its own, each gain with values of its own."""
    layers, gains = aligned_layers(model.modules()), wa.gain_parameters(model)
    for layer, eps, scale in zip(layers, *numbers(len(layers)).values(), strict=True):
        layer.eps, layer.scale = eps, scale
    with torch.no_grad():
        for i, gain in enumerate(gains):
            gain.copy_(torch.linspace(0.6, 1.4, len(gain)) + 0.1 * i)
    return model


def converted(model, **options):
    return vary(wa.convert(model, **options))
