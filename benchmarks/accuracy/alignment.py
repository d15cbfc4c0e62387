"""Alignment of a network's weights, by this package, or by half of the formula for the ablation."""

import math

from torch import Tensor, nn
from torch.nn.utils import parametrize

import weightalign_cuda as wa

# Of the aligned weights. "corrected": a filter that sums to 0 does not see the mean of its input, and a ReLU leaves
# (1 - 1/pi)/2 of the variance, where the paper counts 1/2 (Brock, De, Smith, ICLR 2021).
SCALES = {"wa": 1.0, "half": 0.5, "double": 2.0, "four": 4.0, "corrected": (1 - 1 / math.pi) ** -0.5}
EPS = 1e-5


class Half(nn.Module):
    """A parametrization with the centring of WeightAlign alone, or its scaling alone, and the same gain."""

    def __init__(self, weight: Tensor, part: str) -> None:
        super().__init__()
        self.part = part
        self.gain = nn.Parameter(weight.new_ones(len(weight)))

    def forward(self, weight: Tensor) -> Tensor:
        dims = tuple(range(1, weight.dim()))
        gain = self.gain.view(-1, *[1] * len(dims))
        if self.part == "centre":
            return gain * (weight - weight.mean(dims, keepdim=True))
        n = weight[0].numel()
        return gain * weight / (n / 2 * weight.var(dims, correction=0, keepdim=True) + EPS).sqrt()


PARTS = ("centre", "scale")


def align(model: nn.Module, how: str, gain: str = "ones") -> nn.Module:
    """In place."""
    if how in SCALES:
        wa.convert(model, gain=gain, foreach=True)
        for layer in aligned_layers(model):
            layer.scale = SCALES[how]
    elif how in PARTS:
        for layer in [module for module in model.modules() if isinstance(module, nn.Conv2d)]:
            parametrize.register_parametrization(layer, "weight", Half(layer.weight, how))
    elif how != "none":
        raise ValueError(f"align: expected none, {', '.join((*SCALES, *PARTS))}, got {how!r}")
    return model


def aligned_layers(model: nn.Module) -> list[wa.WAConv2d]:
    return [module for module in model.modules() if isinstance(module, wa.WAConv2d)]


def raw_weight(layer: nn.Module) -> Tensor:
    """The parameter, before any alignment."""
    return layer.parametrizations.weight.original if parametrize.is_parametrized(layer) else layer.weight


def what_scales(layer: nn.Module) -> Tensor:
    """The parameter that makes the output of a convolution 0 if it is 0, and only as long as it is about 0: the gain
    where alignment undoes any scale of the weight."""
    if isinstance(layer, wa.WAConv2d):
        return layer.gain
    if parametrize.is_parametrized(layer) and layer.parametrizations.weight[0].part == "scale":
        return layer.parametrizations.weight[0].gain
    return raw_weight(layer)
