"""`align` and `align_foreach`: check arguments, choose dtype and backend, and call one op for the whole list."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.overrides import handle_torch_function, has_torch_function

from ..ops.autograd import align_directly
from ..ops.backend import NATIVE, choose, run
from ..torch_private import is_any_autocast_enabled
from .checks import (
    DTYPES,
    TENSORS,
    check_gain,
    check_list,
    check_memory_format,
    check_number,
    check_weight,
    device_type,
    per_weight,
    result_dtype,
)
from .dtensor import align_shards, is_sharded


def align(
    weight: Tensor,
    gain: Tensor | None = None,
    *,
    eps: float = 1e-5,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.preserve_format,
) -> Tensor:
    """Aligned weight: scale * gain * (w - mean) / sqrt(n/2 * var + eps) for each filter (arXiv 2010.07160, eq. 10).

    A filter is `weight[k]`, n values; mean and biased variance are per filter. With scale = sqrt(n/2) and eps
    multiplied by n/2, this equals any weight standardisation with eps inside the square root. One kernel launch; twice
    differentiable in weight and gain.

    Args:
        weight: (K, ...), rank 2 or more; float32, float16, bfloat16 or float64. Any strides. A DTensor placed by
            Shard(0), FSDP2's shard of such a shard, or Replicate() is aligned locally, without communication; the
            result has the same placement.
        gain: (K,) or, as in timm, (K, 1, ...); any of these dtypes; device and placement as the weight's. None means 1.
        eps: added to n/2 * var; greater than 0 (at least 1.18e-38). A constant filter gives exactly 0.
        scale: a constant factor.
        dtype: of the result. Default: the autocast dtype if autocast is enabled for the device and the weight is not
            float64, else the weight's dtype. float64 if and only if the weight is float64.
        memory_format: of the result. Default: the weight's strides if they are dense, else contiguous.

    Returns:
        (K, ...) in `dtype`.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what was given, before anything runs.
    """
    if memory_format is torch.preserve_format:
        aligned = aligned_directly([weight], [gain], [eps], [scale], dtype, memory_format)
        if aligned is not None:
            return aligned[0]
    options: dict[str, Any] = {"eps": eps, "scale": scale, "dtype": dtype, "memory_format": memory_format}
    if has_torch_function((weight, gain)):
        return handle_torch_function(align, (weight, gain), weight, gain, **options)
    _check(weight, gain, eps, scale, memory_format)
    if is_sharded((weight, gain)):
        return align_shards(align_foreach, [weight], [gain], [None], **options)[0]
    device_type_ = device_type(weight)
    dtype = result_dtype("weight", weight, device_type_, dtype)
    return run("align_forward", device_type_, [weight], [gain], [eps], [scale], dtype, memory_format)[0][0]


def _check(weight: Any, gain: Any, eps: Any, scale: Any, memory_format: Any) -> None:
    check_weight("weight", weight)
    check_memory_format(memory_format, weight.dim())
    if gain is not None:
        check_gain("gain", gain, weight)
    check_number("eps", eps, positive=True)
    check_number("scale", scale)


def align_foreach(
    weights: Sequence[Tensor],
    gains: Sequence[Tensor | None] | None = None,
    *,
    eps: float | Sequence[float] = 1e-5,
    scale: float | Sequence[float] = 1.0,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.preserve_format,
) -> list[Tensor]:
    """`align` of each weight: one launch forward and one backward for the whole list.

    Args:
        weights: tensors as for `align`. They may differ in device and dtype: each combination is a separate launch.
        gains: one gain or None per weight; None for no gains.
        eps: a number, or one per weight.
        scale: a number, or one per weight.
        dtype: as for `align`, applied to each weight.
        memory_format: as for `align`; channels_last applies to rank 4, channels_last_3d to rank 5, other ranks keep
            their layout.

    Returns:
        The aligned weights, in the order of the list.

    Raises:
        TypeError, ValueError: as for `align`, with the index of the weight or gain.
    """
    weights = check_list("weights", weights)
    count = len(weights)
    gains = [None] * count if gains is None else check_list("gains", gains, count)
    check_memory_format(memory_format)
    each_eps, each_scale = (v if isinstance(v, (list, tuple)) else [v] * count for v in (eps, scale))
    at_once = aligned_directly(weights, gains, each_eps, each_scale, dtype, memory_format) if count else None
    if at_once is not None:
        return list(at_once)
    if has_torch_function((*weights, *gains)):
        options: dict[str, Any] = {"eps": eps, "scale": scale, "dtype": dtype, "memory_format": memory_format}
        return handle_torch_function(align_foreach, (*weights, *gains), weights, gains, **options)
    all_eps = per_weight("eps", eps, count, positive=True)
    scales = per_weight("scale", scale, count)
    if is_sharded((*weights, *gains)):
        options = {"eps": all_eps, "scale": scales, "dtype": dtype, "memory_format": memory_format}
        return align_shards(align_foreach, weights, gains, list(range(count)), **options)
    _check_each(weights, gains)
    groups = by_launch(weights)
    # Check all of them before the first launch.
    dtypes = [result_dtype("weights", weights[i], device_type(weights[i]), dtype, i) for i, *_ in groups]
    results: list[Any] = [None] * count
    for members, each_dtype in zip(groups, dtypes, strict=True):
        each = ([values[i] for i in members] for values in (weights, gains, all_eps, scales))
        for i, aligned in zip(members, _aligned(*each, each_dtype, memory_format), strict=True):
            results[i] = aligned
    return results


def _check_each(weights: Sequence[Any], gains: Sequence[Any]) -> None:
    for i, (weight, gain) in enumerate(zip(weights, gains, strict=True)):
        check_weight("weights", weight, i)
        if gain is not None:
            check_gain("gains", gain, weight, i)


def by_launch(weights: Sequence[Tensor]) -> list[list[int]]:
    """Indices of the weights that one launch can take: those of one device and dtype."""
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, weight in enumerate(weights):
        groups.setdefault((weight.device, weight.dtype), []).append(i)
    return list(groups.values())


def _aligned(weights: Any, *arguments: Any) -> Sequence[Tensor]:
    return run("align_forward", device_type(weights[0]), weights, *arguments)[0]


def aligned_directly(
    weights: list[Any],
    gains: list[Any],
    eps: Sequence[Any],
    scales: Sequence[Any],
    dtype: torch.dtype | None,
    memory_format: torch.memory_format,
    memory: Sequence[Tensor | None] | None = None,
) -> Sequence[Tensor] | None:
    """The fast path of arguments that the native op can take as they are, in one launch. It checks them much faster
    than Python, but does not say what is wrong: None for all others. The results are written to the `memory`, each of a
    former result that nobody uses, where they fit."""
    first = weights[0]
    if is_dynamo_compiling() or type(first) not in TENSORS or choose(device_type_ := device_type(first)) not in NATIVE:
        return None
    if dtype is None:  # for the op the weights' own
        if is_any_autocast_enabled():
            dtype = result_dtype("weights", first, device_type_, None)
    elif dtype not in DTYPES:
        return None
    results = align_directly(weights, gains, eps, scales, dtype, memory_format, memory)
    return None if results is None else results[0]
