"""Preparation of a convolution's input in plain PyTorch (activation, cast, padding, layout), its gradient, and the ops
that combine it with an alignment."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..exporters import wants_plain_operations
from ..layout import empty_in, empty_permuted, statistics_dtype
from .activations import find
from .align import align_backward, align_forward

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")  # the ops use the indices


def mode_of(number: int) -> str:
    if not 0 <= number < len(PADDING_MODES):
        raise ValueError(f"padding_mode: want 0 to {len(PADDING_MODES) - 1}, got {number}")
    return PADDING_MODES[number]


def at_most(padding_mode: str, size: int, wanted: int) -> int:
    """The most padding that the mode allows for a dimension of `size`; `wanted` if it has no limit."""
    return {"zeros": wanted, "reflect": max(size - 1, 0), "circular": size, "replicate": wanted if size else 0}[
        padding_mode
    ]


def pad(x: Tensor, padding: Sequence[int], mode: str) -> Tensor:
    """padding: before and after of each spatial dimension, in their order."""
    pairs = zip(padding[-2::-2], padding[::-2], strict=True)  # F.pad begins with the last dimension
    return F.pad(x, [p for pair in pairs for p in pair], mode="constant" if mode == "zeros" else mode)


def prepare_input(
    input: Tensor,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    padding: Sequence[int],
    padding_mode: int,
    activation: int,
) -> Tensor:
    """(N, C, spatial...) -> (N, C, padded spatial...) in `dtype` and `memory_format`, rounded once."""
    x, formula, mode = input.to(statistics_dtype(input.dtype)), find(activation), mode_of(padding_mode)
    x = formula.value(x) if formula else x
    if wants_plain_operations():
        return pad(x, padding, mode).to(dtype)
    if any(padding):
        # F.pad cannot reflect or repeat if there are no elements; zeros then give the same result.
        x = pad(x, padding, "zeros" if input.numel() == 0 else mode)
    return empty_in(x, x.shape, dtype, memory_format).copy_(x)


def prepare_input_backward(
    grad: Tensor,
    saved: Tensor | None,
    input_dtype: torch.dtype,
    input_order: Sequence[int],
    padding: Sequence[int],
    padding_mode: int,
    activation: int,
) -> Tensor:
    """Gradient of `prepare_input`'s input, by the same operations as in the kernels: no scatter, fixed order.

    Args:
        grad: of the prepared input, any dtype and strides.
        saved: source of the activation's derivative, the prepared input or the input; None without an activation.
        input_dtype, input_order: of the result: its dtype, and its dimensions, outermost first in memory.
    """
    g = grad.to(statistics_dtype(input_dtype))
    pairs = list(zip(padding[::2], padding[1::2], strict=True))
    for dim, (before, after) in enumerate(pairs, start=2):
        g = _unpad(g, dim, before, after, mode_of(padding_mode))
    if formula := find(activation):
        if formula.is_from_result:
            for dim, (before, _) in enumerate(pairs, start=2):
                saved = saved.narrow(dim, before, g.shape[dim])  # type: ignore[union-attr]
        derivative = formula.derivative(saved.to(g.dtype))  # type: ignore[union-attr]
        # Where the derivative is 0 the result is 0, even if the gradient is inf or nan.
        g = (g * derivative).where(derivative != 0, 0)
    return empty_permuted(g, g.shape, input_order, input_dtype).copy_(g)


def _unpad(g: Tensor, dim: int, before: int, after: int, mode: str) -> Tensor:
    """Gradient of the interior along one dimension, plus that of its copies in the padding."""
    size = g.shape[dim] - before - after
    head, interior, tail = g.split([before, size, after], dim)
    if mode == "zeros" or before == after == 0:
        return interior
    interior = interior.clone()
    if mode == "reflect":
        interior.narrow(dim, 1, before).add_(head.flip(dim))
        interior.narrow(dim, size - 1 - after, after).add_(tail.flip(dim))
    elif mode == "replicate":
        interior.narrow(dim, 0, 1).add_(head.sum(dim, keepdim=True))
        interior.narrow(dim, size - 1, 1).add_(tail.sum(dim, keepdim=True))
    else:
        interior.narrow(dim, size - before, before).add_(head)
        interior.narrow(dim, 0, after).add_(tail)
    return interior


def prepare_forward(
    input: Tensor,
    weights: Sequence[Tensor],
    gains: Sequence[Tensor | None],
    eps: Sequence[float],
    scales: Sequence[float],
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    *preparation: Any,
) -> tuple[Tensor, list[Tensor], Tensor]:
    """The op prepare_forward; preparation: padding, padding_mode, activation."""
    prepared = prepare_input(input, dtype, memory_format, *preparation)
    return prepared, *align_forward(weights, gains, eps, scales, dtype, memory_format)


def prepare_backward(
    grad_prepared: Tensor,
    saved: Tensor | None,
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    gains: Sequence[Tensor | None],
    statistics: Tensor,
    scales: Sequence[float],
    *preparation: Any,
) -> tuple[Tensor, list[Tensor], Tensor]:
    """The op prepare_backward; preparation: input_dtype, input_order, padding, padding_mode, activation."""
    grad_input = prepare_input_backward(grad_prepared, saved, *preparation)
    return grad_input, *align_backward(grads, weights, gains, statistics, scales)
