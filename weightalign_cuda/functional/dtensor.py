"""DTensors: each process aligns the filters and prepares the part of the input that it has, without communication."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops.layout import empty_in, empty_permuted, empty_result, memory_order
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
    for weight, gain, index in zip(weights, gains, indices, strict=True):
        _check_filters(weight, gain, index)
    local = [list(map(_local, tensors)) for tensors in (weights, gains)]
    results = align_foreach(*local, memory_format=memory_format, **options)
    return [_aligned_as(w, r, memory_format) for w, r in zip(weights, results, strict=True)]


def prepare_shards(
    prepare: Callable[..., tuple[Tensor, Tensor, list[int]]],
    input: Any,
    weight: Any,
    gain: Any,
    padding: Sequence[int],
    memory_format: torch.memory_format,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """`prepare` of the local shards; its results are placed as input and weight.

    padding: (before, after) of each spatial dimension, as far as it is not left to the convolution.

    Raises:
        ValueError: unless input and weight are DTensors of the same ranks; for an input that is a partial sum, or
            sharded along a padded dimension; for weight and gain as `align_shards`.
    """
    _check_filters(weight, gain, None)
    if not (is_sharded([input]) and is_sharded([weight]) and _have_one_mesh(input, weight)):
        wanted, got = map(_described, (weight, input))
        raise ValueError(f"input: expected one to go with the weight, {wanted}; got {got}")
    spatial = weight.dim() - 2
    padded = {input.dim() - spatial + i for i in range(spatial) if any(padding[2 * i : 2 * i + 2])}
    for placement in input.placements:
        # A partial sum must be summed first: no activation is linear.
        if not placement.is_replicate() and getattr(placement, "dim", None) in {None, *padded}:
            raise ValueError(
                "input: expected a DTensor placed by Replicate() or, not along a dimension that is padded here, by "
                f"Shard(); got {placement}; redistribute it first"
            )
    own = input.to_local()
    prepared, aligned, _ = prepare(own, weight.to_local(), _local(gain), memory_format=memory_format, **options)
    if prepared is not own:
        input = _prepared_as(input, prepared, spatial, memory_format)
    return input, weight if options["is_aligned"] else _aligned_as(weight, aligned, memory_format)


def convolve_shards(
    convolution: Callable[..., Tensor], input: Any, weight: Any, bias: Any, *sizes: Any, groups: int, by: int = 0
) -> Tensor:
    """torch's `convolution` of the local shards, without communication: of an input that is replicated or sharded by
    batch and a weight that is replicated or, for a replicated input, sharded by filters, along its dimension `by`.

    torch's own rules for DTensors would not do. Up to 2.15 sharded filters and images give shards of another shape than
    the result claims to have, without an error; in 2.11 so do most convolutions, and some gradients are wrong.

    Args:
        sizes: the other arguments of `convolution`.

    Raises:
        ValueError: for other placements; for sharded filters in groups.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    batch, channels = (0, 1) if input.dim() == weight.dim() else (None, 0)
    # input and weight: the result, and the gradients of input, weight and bias
    rules: dict[Any, tuple[Any, ...]] = {(Replicate(), Replicate()): (Replicate(),) * 4}
    if batch is not None:
        rules[Shard(0), Replicate()] = Shard(0), Shard(0), Partial(), Partial()
    if groups == 1:
        rules[Replicate(), Shard(by)] = Shard(channels), Partial(), Shard(by), Shard(0)
    pairs = list(zip(input.placements, weight.placements, strict=True))
    for pair in pairs:
        if pair not in rules:
            wanted = ", or ".join(f"{of_input} with a weight's {of_weight}" for of_input, of_weight in rules)
            raise ValueError(
                f"input: expected the placement {wanted}; got {pair[0]} with {pair[1]}; redistribute first"
            )
    placements, *gradients = zip(*(rules[pair] for pair in pairs), strict=True)
    if bias is not None:
        by_filters = tuple(Shard(0) if placement.is_shard() else Replicate() for placement in weight.placements)
        if not is_sharded([bias]) or not _have_one_mesh(bias, weight) or bias.placements != by_filters:
            ranks = weight.device_mesh.mesh.tolist()
            raise ValueError(
                f"bias: expected a DTensor placed by {by_filters} on ranks {ranks}; got {_described(bias)}"
            )
    tensors = zip((input, weight, bias), gradients, strict=True)
    local = convolution(*(t if t is None else t.to_local(grad_placements=of) for t, of in tensors), *sizes)
    shape = list(local.shape)
    for placement in placements:
        if placement.is_shard():
            shape[placement.dim] = input.shape[0] if placement.dim == batch else weight.shape[by]
    whole = empty_permuted(torch.empty(0, device="meta"), shape, memory_order(local), local.dtype)
    return DTensor.from_local(
        local, input.device_mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def ones_for(weight: Any, gain: Any) -> Tensor:
    """Ones to load for `gain` from a checkpoint that has `weight`."""
    # Assigned to a model that is not sharded yet, the checkpoint's DTensors make it one that is.
    like = gain if is_sharded([gain]) or not is_sharded([weight]) else weight
    if not is_sharded([like]):
        return torch.ones(gain.shape, dtype=gain.dtype, device=weight.device)
    from torch.distributed.tensor import ones

    return ones(gain.shape, dtype=gain.dtype, device_mesh=like.device_mesh, placements=like.placements)


def _check_filters(weight: Any, gain: Any, index: int | None) -> None:
    """index: None for a single weight."""
    name, of_gain = ("weight", "gain") if index is None else ("weights", "gains")
    for placement in weight.placements if is_sharded([weight]) else ():
        # FSDP2's private placement for a shard of a shard, which is no subclass of Shard, has whole filters, too.
        if not placement.is_replicate() and getattr(placement, "dim", None) != 0:
            raise ValueError(
                f"{at(name, index)}: expected a DTensor placed by Shard(0), by whole filters, or Replicate(); got "
                f"{placement}; redistribute it first"
            )
    if gain is None or not is_sharded((weight, gain)):
        return
    are_alike = is_sharded([weight]) and is_sharded([gain]) and _have_one_mesh(weight, gain)
    if not are_alike or weight.placements != gain.placements:
        wanted, got = map(_described, (weight, gain))
        raise ValueError(f"{at(of_gain, index)}: expected the weight's placement, {wanted}; got {got}")


def _have_one_mesh(a: Any, b: Any) -> bool:
    """Whether the same ranks hold them in the same order: meshes of equal shape may have others, and a mesh and a part
    of a larger one the same."""
    meshes = a.device_mesh, b.device_mesh
    return meshes[0] == meshes[1] or torch.equal(*(mesh.mesh for mesh in meshes))


def _described(t: Any) -> str:
    # The mesh's own repr does not name the ranks.
    return f"{t.placements} on ranks {t.device_mesh.mesh.tolist()}" if is_sharded([t]) else "a tensor of this process"


def _local(t: Any) -> Any:
    return t.to_local() if is_sharded([t]) else t


def _aligned_as(weight: Any, local: Tensor, memory_format: torch.memory_format) -> Tensor:
    if not is_sharded([weight]):
        return local
    whole = torch.empty_strided(weight.shape, weight.stride(), device="meta")
    return placed_as(weight, local, empty_result(whole, local.dtype, memory_format))


def _prepared_as(input: Any, local: Tensor, spatial: int, memory_format: torch.memory_format) -> Tensor:
    sharded = {getattr(placement, "dim", None) for placement in input.placements}
    shape = [(input if d in sharded else local).shape[d] for d in range(input.dim())]
    is_batched = input.dim() == spatial + 2
    whole = empty_in(torch.empty(0, device="meta"), [1, *shape][is_batched:], local.dtype, memory_format)
    return placed_as(input, local, whole if is_batched else whole[0])


def placed_as(sharded: Any, local: Tensor, whole: Any) -> Tensor:
    """`local` as the shard of a DTensor with the placement of `sharded`, and shape and strides of `whole`."""
    from torch.distributed.tensor import DTensor

    # from_local would assume even shards.
    shape = {"shape": whole.shape, "stride": whole.stride()}
    return DTensor.from_local(local, sharded.device_mesh, sharded.placements, run_check=False, **shape)
