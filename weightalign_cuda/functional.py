"""The functions users call: arguments checked, dtype and backend chosen, one op call for a whole list."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _backend, ops, reference
from ._layout import CHANNELS_LAST_RANK

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


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

    A filter is `weight[k]`, n values; mean and biased variance are taken over it. With scale = sqrt(n/2) and a suitable
    eps this is any weight standardisation. One kernel launch; differentiable (twice) in weight and gain.

    Args:
        weight: (K, ...), rank 2 or more; float32, float16, bfloat16 or float64. Any strides.
        gain: (K,), any floating dtype, on the weight's device; None for 1.
        eps: added to n/2 * var; greater than 0. A constant filter gives exactly 0.
        scale: a constant factor.
        dtype: of the result. Default: autocast's where autocast is on for the device and the weight is not float64,
            else the weight's. float64 goes to float64 only.
        memory_format: of the result. Default: the weight's own strides if they are dense, else contiguous.

    Returns:
        (K, ...) in `dtype`.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is wanted, before anything runs.
    """
    _check_weight("weight", weight)
    _check_memory_format(memory_format)
    rank = CHANNELS_LAST_RANK.get(memory_format)
    if rank is not None and weight.dim() != rank:
        raise ValueError(f"memory_format: {memory_format} is for rank {rank}, got a weight of rank {weight.dim()}")
    if gain is not None:
        _check_gain("gain", gain, weight)
    _check_number("eps", eps, positive=True)
    _check_number("scale", scale)
    return _run([weight], [gain], [eps], [scale], _result_dtype("weight", weight, dtype), memory_format)[0]


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
        weights: tensors as for `align`. They may differ in device and dtype: each kind is a launch of its own.
        gains: one gain or None for each weight; None for none at all.
        eps, scale: a number, or one for each weight.
        dtype: as for `align`, decided for each weight.
        memory_format: as for `align`; channels_last means rank 4, channels_last_3d rank 5, other ranks keep their
            layout.

    Returns:
        The aligned weights, in the order of the list.

    Raises:
        TypeError, ValueError: as `align`, with the index of the weight or gain.
    """
    weights = _check_list("weights", weights)
    count = len(weights)
    gains = [None] * count if gains is None else _check_list("gains", gains, count)
    _check_memory_format(memory_format)
    all_eps = _per_weight("eps", eps, count, positive=True)
    scales = _per_weight("scale", scale, count)
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, (weight, gain) in enumerate(zip(weights, gains, strict=True)):
        _check_weight("weights", weight, i)
        if gain is not None:
            _check_gain("gains", gain, weight, i)
        groups.setdefault((weight.device, weight.dtype), []).append(i)
    result_dtypes = [_result_dtype("weights", weights[members[0]], dtype, members[0]) for members in groups.values()]
    results: list[Any] = [None] * count
    for members, result_dtype in zip(groups.values(), result_dtypes, strict=True):
        aligned = _run(
            [weights[i] for i in members],
            [gains[i] for i in members],
            [all_eps[i] for i in members],
            [scales[i] for i in members],
            result_dtype,
            memory_format,
        )
        for i, tensor in zip(members, aligned, strict=True):
            results[i] = tensor
    return results


def _run(weights: list[Tensor], gains: list[Tensor | None], *options: Any) -> Sequence[Tensor]:
    """options: the op's other arguments; all weights are of one device and dtype."""
    if _backend.choose(weights[0].device.type) == "reference":
        return reference.align_forward(weights, gains, *options)[0]
    run = ops.align_forward if torch.compiler.is_compiling() else ops.align_with_autograd
    return run(weights, gains, *options)[0]


def _result_dtype(name: str, weight: Tensor, dtype: torch.dtype | None, index: int | None = None) -> torch.dtype:
    if dtype is None:
        device_type = weight.device.type
        if weight.dtype is torch.float64 or device_type == "meta" or not torch.is_autocast_enabled(device_type):
            return weight.dtype
        return torch.get_autocast_dtype(device_type)
    if dtype not in DTYPES:
        raise TypeError(f"dtype: expected float32, float16, bfloat16 or float64, got {dtype}")
    if (dtype == torch.float64) != (weight.dtype == torch.float64):
        raise ValueError(
            f"dtype: float64, and nothing else, goes to float64; got {dtype} for {_at(name, index)} of {weight.dtype}"
        )
    return dtype


def _at(name: str, index: int | None) -> str:
    return name if index is None else f"{name}[{index}]"


def _check_tensor(name: str, value: Any, index: int | None, expected: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{_at(name, index)}: expected {expected}, got {type(value).__name__}")
    if value.dtype not in DTYPES:
        raise TypeError(f"{_at(name, index)}: expected float32, float16, bfloat16 or float64, got {value.dtype}")
    if value.layout is not torch.strided:
        raise TypeError(f"{_at(name, index)}: expected a strided tensor, got layout {value.layout}")


def _check_weight(name: str, weight: Any, index: int | None = None) -> None:
    _check_tensor(name, weight, index, "a Tensor")
    if weight.dim() < 2:
        raise ValueError(
            f"{_at(name, index)}: expected rank 2 or more, filters along dimension 0; got shape {tuple(weight.shape)}"
        )


def _check_gain(name: str, gain: Any, weight: Tensor, index: int | None = None) -> None:
    _check_tensor(name, gain, index, "a Tensor or None")
    if gain.dim() != 1 or gain.size(0) != weight.size(0):
        raise ValueError(
            f"{_at(name, index)}: expected shape ({weight.size(0)},), one for each filter; got {tuple(gain.shape)}"
        )
    if gain.device != weight.device:
        raise ValueError(f"{_at(name, index)}: expected the weight's device {weight.device}, got {gain.device}")


def _check_number(name: str, value: Any, positive: bool = False, index: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, (float, int)):
        raise TypeError(f"{_at(name, index)}: expected a number, got {type(value).__name__}")
    if not abs(value) < math.inf or (positive and value <= 0):  # not isfinite: torch.compile passes symbols
        wanted = "a finite number greater than 0" if positive else "a finite number"
        raise ValueError(f"{_at(name, index)}: expected {wanted}, got {value}")


def _per_weight(name: str, value: Any, count: int, positive: bool = False) -> list[float]:
    if not isinstance(value, (list, tuple)):
        _check_number(name, value, positive)
        return [value] * count
    for i, each in enumerate(_check_list(name, value, count)):
        _check_number(name, each, positive, i)
    return list(value)


def _check_list(name: str, value: Any, count: int | None = None) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name}: expected a list or tuple, got {type(value).__name__}")
    if count is not None and len(value) != count:
        raise ValueError(f"{name}: expected one for each of the {count} weights, got {len(value)}")
    return list(value)


def _check_memory_format(memory_format: Any) -> None:
    if not isinstance(memory_format, torch.memory_format):
        raise TypeError(f"memory_format: expected a torch.memory_format, got {type(memory_format).__name__}")
