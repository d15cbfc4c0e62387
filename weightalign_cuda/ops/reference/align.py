"""WeightAlign in plain PyTorch, written like the formula: the reference for all backends, on every device,
differentiable any number of times (Shi, Li, Liu, van Gemert, "WeightAlign", arXiv 2010.07160, eq. 10)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..exporters import wants_plain_operations
from ..layout import empty_result, statistics_dtype


def moments(weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, deviations and 1 / sqrt(n/2 * var + eps) of each filter, (K, 1, ...), (K, ...), (K, 1, ...).

    The mean is computed relative to the filter's first value, so that it is exact for a constant filter; its rounding
    error, the mean of the deviations, is then subtracted, too (e.g. mean 1e4, deviation 1e-3 in float32).
    """
    w = weight.to(statistics_dtype(weight.dtype))
    dims = tuple(range(1, w.dim()))
    n = w.shape[1:].numel()
    if n == 0:
        none = w.new_zeros((w.shape[0],) + (1,) * len(dims))
        return none, w, none
    pivot = w.detach()[(slice(None),) + (slice(1),) * len(dims)]
    mean = pivot + (w - pivot).mean(dims, keepdim=True)
    rest = (w - mean).mean(dims, keepdim=True)
    deviations = w - mean - rest
    var = deviations.square().mean(dims, keepdim=True)
    # Not rsqrt: its derivative cubes it, which underflows to 0 in float32 for deviations of 1e12 and more.
    return mean + rest, deviations, 1 / (n / 2 * var + eps).sqrt()


def align(
    weight: Tensor,
    gain: Tensor | None,
    eps: float,
    scale: float,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> tuple[Tensor, Tensor]:
    """scale * gain * (w - mean) / sqrt(n/2 * var + eps) in `dtype`, and the statistics (K, 2): mean and rstd."""
    mean, deviations, rstd = moments(weight, eps)
    factor = rstd * scale
    if gain is not None:
        factor = factor * gain.to(rstd.dtype).view_as(rstd)
    product = deviations * factor
    if wants_plain_operations():
        aligned = product.to(dtype)
    else:
        aligned = empty_result(weight, dtype, memory_format, like=product).copy_(product)
    return aligned, torch.stack([mean.flatten(), rstd.flatten()], dim=1)


def align_forward(
    weights: Sequence[Tensor],
    gains: Sequence[Tensor | None],
    eps: Sequence[float],
    scales: Sequence[float],
    dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> tuple[list[Tensor], Tensor]:
    """The op align_forward."""
    results = [align(*each, dtype, memory_format) for each in zip(weights, gains, eps, scales, strict=True)]
    return [aligned for aligned, _ in results], torch.cat([statistics for _, statistics in results])


def align_backward(
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    gains: Sequence[Tensor | None],
    statistics: Tensor,
    scales: Sequence[float],
) -> tuple[list[Tensor], Tensor]:
    """The op align_backward: with x = (w - mean) * rstd and G the gradient of the aligned weight,

    d gain = scale * sum(G x),  d w = scale * gain * rstd * (G - mean(G) - x * sum(G x) / 2).
    """
    grad_weights, grad_gains, row = [], [], 0
    for grad, weight, gain, scale in zip(grads, weights, gains, scales, strict=True):
        shape = (weight.shape[0],) + (1,) * (weight.dim() - 1)
        dims = tuple(range(1, weight.dim()))
        mean, rstd = (s.reshape(shape) for s in statistics[row : row + weight.shape[0]].unbind(1))
        row += weight.shape[0]
        g = grad.to(rstd.dtype)
        x = weight.to(rstd.dtype) - mean
        x = (x - x.mean(dims, keepdim=True)) * rstd
        along = (g * x).sum(dims, keepdim=True)
        factor = scale * rstd if gain is None else scale * rstd * gain.to(rstd.dtype).view(shape)
        product = factor * (g - g.mean(dims, keepdim=True) - x * along / 2)
        grad_weights.append(empty_result(weight, weight.dtype, torch.preserve_format, like=product).copy_(product))
        grad_gains.append(scale * along.reshape(-1))
    return grad_weights, torch.cat(grad_gains) if grad_gains else statistics.new_empty(0)
