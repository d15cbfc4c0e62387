"""Strides and dtypes of results: the rules that fake kernels and the reference share with csrc/common."""

from collections.abc import Sequence

import torch
from torch import Tensor

CHANNELS_LAST_RANK = {torch.channels_last: 4, torch.channels_last_3d: 5}


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of sums and statistics, for tensors of this dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def is_dense(t: Tensor) -> bool:
    """Whether the elements fill one block of memory without gaps or overlaps, in any order of the dimensions."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(t.stride(), t.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def looks_channels_last(t: Tensor) -> bool:
    """Whether the strides are ordered as in channels_last(_3d), dense or not; if they are also ordered as in a
    contiguous tensor, they count as contiguous. (The rule of torch's convolutions.)"""
    least = 0
    if t.stride(1) == 0:
        return False
    for d in (1, *range(t.dim() - 1, 1, -1), 0):
        size, stride = t.shape[d], t.stride(d)
        if size == 0 or stride < least or (d == 0 and least == t.stride(1)):
            return False
        least = stride * size if size > 1 else stride
    return True


def memory_order(t: Tensor) -> list[int]:
    """t's dimensions, outermost first in memory; in their given order if t is not dense."""
    dims, strides, shape = list(range(t.dim())), t.stride(), t.shape
    # Of two dimensions with equal strides the inner one has size 1: a result in this order then has exactly t's
    # strides.
    return sorted(dims, key=lambda d: (-strides[d], shape[d] == 1)) if is_dense(t) else dims


def padded_shape(shape: Sequence[int], padding: Sequence[int], sign: int = 1) -> list[int]:
    """(N, C, spatial...) plus `padding`, (before, after) of each spatial dimension; minus it if sign is -1."""
    added = [before + after for before, after in zip(padding[::2], padding[1::2], strict=True)]
    return [*shape[:2], *(size + sign * more for size, more in zip(shape[2:], added, strict=True))]


def empty_result(
    t: Tensor, dtype: torch.dtype, memory_format: torch.memory_format, like: Tensor | None = None
) -> Tensor:
    """An uninitialised tensor of t's shape: in `memory_format` if it applies to this rank, else with t's strides if
    they are dense, else contiguous; contiguous, too, if it has no elements. Device and vmap batching are those of
    `like`, by default t."""
    like = t if like is None else like
    named = CHANNELS_LAST_RANK.get(memory_format) == t.dim()
    if not named and memory_format != torch.contiguous_format and t.numel() and is_dense(t):
        return like.new_empty_strided(t.shape, t.stride(), dtype=dtype)
    return empty_in(like, t.shape, dtype, memory_format)


def empty_in(like: Tensor, shape: Sequence[int], dtype: torch.dtype, memory_format: torch.memory_format) -> Tensor:
    """An uninitialised tensor in channels_last(_3d) if that is the format, it fits the rank and there are elements;
    else contiguous."""
    fits = CHANNELS_LAST_RANK.get(memory_format) == len(shape) and 0 not in shape
    kept = memory_format if fits else torch.contiguous_format
    return like.new_empty_strided(shape, torch.empty(shape, device="meta", memory_format=kept).stride(), dtype=dtype)


def empty_permuted(like: Tensor, shape: Sequence[int], order: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor whose dimensions lie in memory in this order, outermost first."""
    return like.new_empty_strided(shape, torch.empty_permuted(shape, list(order), device="meta").stride(), dtype=dtype)
