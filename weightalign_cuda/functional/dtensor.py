"""DTensors that are sharded by filters: each process aligns its own, and nobody has to tell anybody anything."""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..ops.layout import empty_result
from .checks import PLAIN, at


def is_sharded(tensors: Any) -> bool:
    """Whether some of them are DTensors. Lazily imported by torch, and not looked for among plain tensors."""
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
    """`align_foreach` of the local shards, put together as the weights are; gradients likewise.

    indices: what the caller calls them in errors.

    Raises:
        ValueError: for a weight that is sharded within filters, or a gain that is not placed as its weight.
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
    together = zip(weights, results, strict=True)
    return [_placed_as(w, r, memory_format) if isinstance(w, DTensor) else r for w, r in together]


def _check_placements(name: str, weight: Any) -> None:
    for placement in weight.placements:
        # Exactly these: the subclass that FSDP2 makes of a shard of a shard has filters of other processes between.
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

    # Told, not asked: shards may be uneven.
    whole = empty_result(torch.empty_strided(weight.shape, weight.stride(), device="meta"), local.dtype, memory_format)
    placement = weight.device_mesh, weight.placements
    return DTensor.from_local(local, *placement, run_check=False, shape=whole.shape, stride=whole.stride())
