"""Which order in memory the kernels read and write, where a weight or a result has another one."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..layout import is_dense, memory_order
from .align_kernels import WIDTHS


def with_contiguous_filters(weight: Tensor) -> Tensor:
    """The weight, or a copy of it, with each filter contiguous in memory, its dimensions in any order."""
    if weight.is_contiguous():
        return weight
    filters = weight.shape[0]
    has_contiguous_filters = is_dense(weight) and (filters == 1 or weight.stride(0) * filters == weight.numel())
    return weight if has_contiguous_filters else weight.contiguous()


def empty_in_order_of(source: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(source.shape, source.stride(), dtype=dtype, device=source.device)


def copied_into(results: list[Tensor], written: Sequence[Tensor]) -> list[Tensor]:
    """The results; those whose layout the kernel could not write are copied into it."""
    for out, result in zip(written, results, strict=True):
        if out is not result:
            result.copy_(out)
    return results


def have_same_order(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of the same shape have the same order in memory."""
    strides = a.stride(), b.stride()
    return strides[0] == strides[1] or all(n == 1 or i == j for n, i, j in zip(a.shape, *strides, strict=True))


def transposed_columns(source: Tensor, aligned: Tensor) -> int | None:
    """As in `Task`: 0 if both have the same order in memory, None if the kernels do not support that of `aligned`."""
    if source.numel() == 0 or have_same_order(source, aligned):
        return 0
    if source.shape[1:].numel() > WIDTHS.value[-1] or not is_dense(aligned):
        return None
    orders = [[d for d in memory_order(t) if t.shape[d] > 1] for t in (source, aligned)]
    if source.shape[0] > 1 and any(order.pop(0) != 0 for order in orders):
        return None
    # A transpose rotates the order of dimensions: rows + columns become columns + rows.
    inside, other = orders
    begin = inside.index(other[0])
    return math.prod(source.shape[d] for d in inside[begin:]) if inside[begin:] + inside[:begin] == other else None
