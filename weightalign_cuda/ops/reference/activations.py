"""Activations of a convolution's input in plain PyTorch, and their public names."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class Activation(NamedTuple):
    """To add one: a line here, one in csrc/common/activations.h and one in ..triton.activations. f(0) must be 0: some
    kernels pad before the activation, some after."""

    value: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]  # as a function of the input
    is_from_result: bool = False  # whether it is the same function of the result, which the convolution saves


def _silu_derivative(x: Tensor) -> Tensor:
    s = x.sigmoid()
    return s * (1 + x * (1 - s))


def _gelu_derivative(x: Tensor) -> Tensor:
    """Derivative of x * Phi(x), where Phi is the standard normal CDF."""
    return (1 + (x * 0.5**0.5).erf()) / 2 + x * (x.square() / -2).exp() * (2 * math.pi) ** -0.5


def _hardswish_derivative(x: Tensor) -> Tensor:
    return (x / 3 + 0.5).where(x > -3, 0).where(x < 3, 1)


_ACTIVATIONS = {
    "relu": Activation(F.relu, lambda x: x.gt(0), is_from_result=True),
    "silu": Activation(F.silu, _silu_derivative),
    "gelu": Activation(F.gelu, _gelu_derivative),
    "hardswish": Activation(F.hardswish, _hardswish_derivative),
}
ACTIVATIONS = (None, *_ACTIVATIONS)  # the ops use the indices


def find(number: int) -> Activation | None:
    """The activation with this number; None for 0."""
    if not 0 <= number < len(ACTIVATIONS):
        raise ValueError(f"activation: want 0 to {len(ACTIVATIONS) - 1}, got {number}")
    name = ACTIVATIONS[number]
    return None if name is None else _ACTIVATIONS[name]


def activate(x: Tensor, name: str | None) -> Tensor:
    return x if name is None else _ACTIVATIONS[name].value(x)
