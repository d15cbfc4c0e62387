"""Memory of aligned filters that those of the next forward may have, once nobody else uses it: fresh memory costs the
CPU a page fault for each 4 KiB, and all of them together more than aligning the values (benchmarks/NOTES.md)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import direct
from .spent import MIN_VALUES


def memory_of(filters: Sequence[Tensor]) -> list[Tensor | None]:
    """Of each of the filters, a tensor that keeps their memory, where that is worth it. Empty if it is for none."""
    if not direct.is_open():
        return []
    kept = [t.detach() if t.numel() >= MIN_VALUES and t.is_cpu else None for t in filters]
    return kept if any(t is not None for t in kept) else []


def which_are_free(memory: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Those of `memory_of` that nothing but the list refers to, for a direct call; empty if there cannot be one."""
    if not memory or not direct.is_open():
        return []
    # Each time anew, as a debugger counts in both.
    free = direct.storage_state(torch.empty(MIN_VALUES, dtype=torch.float32, device="cpu"))
    return [t if t is not None and direct.storage_state(t) == free else None for t in memory]
