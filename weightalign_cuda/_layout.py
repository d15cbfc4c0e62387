"""Strides of results: the rule that fake kernels and the reference share with csrc/common/layout.cpp."""

import torch
from torch import Tensor

CHANNELS_LAST_RANK = {torch.channels_last: 4, torch.channels_last_3d: 5}


def is_dense(t: Tensor) -> bool:
    """Whether the elements fill one block of memory, each once, in any order of the dimensions."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(t.stride(), t.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def empty_result(t: Tensor, dtype: torch.dtype, memory_format: torch.memory_format) -> Tensor:
    """An uninitialised tensor of t's shape: in `memory_format` (ranks it does not name keep theirs), else in t's own
    strides if they are dense, else contiguous; contiguous, too, if it has no elements."""
    if t.numel() == 0:
        return torch.empty(t.shape, dtype=dtype, device=t.device)
    if CHANNELS_LAST_RANK.get(memory_format) == t.dim():
        return torch.empty(t.shape, dtype=dtype, device=t.device, memory_format=memory_format)
    if memory_format != torch.contiguous_format and is_dense(t):
        return torch.empty_strided(t.shape, t.stride(), dtype=dtype, device=t.device)
    return torch.empty(t.shape, dtype=dtype, device=t.device)
