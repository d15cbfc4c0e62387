"""DTensors sharded by filters: each rank aligns its local shard, without communication."""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..ops.layout import empty_result
from .checks import PLAIN, at


def is_sharded(tensors: Any) -> bool:
    """Whether any of them is a DTensor, without importing that module: torch imports it lazily."""
    others = [t for t in tensors if type(t) not in PLAIN]
    if not others or "torch.distributed.tensor" not in sys.modules:
        return False
    from torch.distributed.tensor import DTensor

    return any(isinstance(t, DTensor) for t in others)


def align_shards(
    align_foreach: Callable[..., list[Tensor]],
    weights: list[Any],
    gains: list[Any],
    indices: list[int | None],
    memory_format: torch.memory_format,
    **options: Any,
) -> list[Tensor]:
    """`align_foreach` of the local shards; results and gradients are placed as the weights.

    indices: positions in the caller's lists, for errors; None for a single weight.

    Raises:
        ValueError: for a weight sharded within filters, or a gain whose placement differs from its weight's.
    """
    from torch.distributed.tensor import DTensor

    for weight, gain, index in zip(weights, gains, indices, strict=True):
        is_list = index is not None
        if isinstance(weight, DTensor):
            _check_placements(at("weights" if is_list else "weight", index), weight)
        if gain is not None:
            _check_alike(at("gains" if is_list else "gain", index), gain, weight)
    local = [[t.to_local() if isinstance(t, DTensor) else t for t in tensors] for tensors in (weights, gains)]
    results = align_foreach(*local, memory_format=memory_format, **options)
    pairs = zip(weights, results, strict=True)
    return [_placed_as(w, r, memory_format) if isinstance(w, DTensor) else r for w, r in pairs]


def _check_placements(name: str, weight: Any) -> None:
    for placement in weight.placements:
        # Only these: FSDP2's subclass for a shard of a shard has filters of other ranks in between.
        if not (placement.is_replicate() or placement.is_shard(0)):
            raise ValueError(
                f"{name}: expected a DTensor placed by Shard(0), by whole filters, or Replicate(); got {placement}; "
                "redistribute it first"
            )


def _check_alike(name: str, gain: Any, weight: Any) -> None:
    wanted, got = (
        (t.device_mesh, t.placements) if hasattr(t, "placements") else "a tensor of this process"
        for t in (weight, gain)
    )
    if wanted != got:
        raise ValueError(f"{name}: expected the weight's placement {wanted}, got {got}")


def _placed_as(weight: Any, local: Tensor, memory_format: torch.memory_format) -> Tensor:
    from torch.distributed.tensor import DTensor

    # Pass the global shape: from_local would assume even shards.
    whole = empty_result(torch.empty_strided(weight.shape, weight.stride(), device="meta"), local.dtype, memory_format)
    placement = weight.device_mesh, weight.placements
    return DTensor.from_local(local, *placement, run_check=False, shape=whole.shape, stride=whole.stride())
