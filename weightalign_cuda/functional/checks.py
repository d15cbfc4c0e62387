"""Argument checks: they raise TypeError or ValueError, naming the argument, what was expected and what was given.

Each check is one expression that is true for every valid argument, cheap enough for calls on tiny weights; only if it
is false does further code find out what is wrong.
"""

import math
import sys
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.exporters import wants_plain_operations
from ..ops.layout import CHANNELS_LAST_RANK
from ..ops.reference.activations import ACTIVATIONS
from ..torch_private import is_any_autocast_enabled

TENSORS = {Tensor, nn.Parameter}  # no __torch_function__ overrides
PLAIN = {*TENSORS, type(None)}  # None: a gain of 1
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Of an eps: the root of less may be 0 in float32, and a constant filter, of whose deviations it is the divisor, NaN.
SMALLEST = torch.finfo(torch.float32).tiny
_FLOATS = "float32, float16, bfloat16 or float64"


def at(name: str, index: int | None) -> str:
    return name if index is None else f"{name}[{index}]"


def check_input(name: str, input: Any, weight: Tensor) -> None:
    """A convolution's input, batched or not; the weight must have 1 to 3 spatial dimensions."""
    _check_tensor(name, input, "a Tensor")
    if not 3 <= weight.dim() <= 5:
        raise ValueError(f"weight: expected 1 to 3 spatial dimensions, got shape {tuple(weight.shape)}")
    if input.dim() not in (weight.dim(), weight.dim() - 1):
        raise ValueError(
            f"{name}: expected rank {weight.dim()}, or {weight.dim() - 1} without a batch; got {tuple(input.shape)}"
        )
    if input.device != weight.device:
        raise ValueError(f"{name}: expected the weight's device {weight.device}, got {input.device}")


def check_weight(name: str, weight: Any, index: int | None = None) -> None:
    _check_tensor(name, weight, "a Tensor", index)
    if weight.dim() < 2:
        raise ValueError(
            f"{at(name, index)}: expected rank 2 or more, filters along dimension 0; got shape {tuple(weight.shape)}"
        )


def check_gain(name: str, gain: Any, weight: Tensor, index: int | None = None) -> None:
    _check_tensor(name, gain, "a Tensor or None", index)
    if not wants_plain_operations() and (gain.shape[:1] != weight.shape[:1] or any(n != 1 for n in gain.shape[1:])):
        filters = weight.shape[0]
        raise ValueError(
            f"{at(name, index)}: expected shape ({filters},) or ({filters}, 1, ...), one for each filter; "
            f"got {tuple(gain.shape)}"
        )
    if gain.device != weight.device:
        raise ValueError(f"{at(name, index)}: expected the weight's device {weight.device}, got {gain.device}")


def _check_tensor(name: str, value: Any, expected: str, index: int | None = None) -> None:
    if isinstance(value, Tensor) and value.dtype in DTYPES and value.layout is torch.strided and not value.is_nested:
        return
    name = at(name, index)
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected {expected}, got {type(value).__name__}")
    if value.dtype not in DTYPES:
        raise TypeError(f"{name}: expected {_FLOATS}, got {value.dtype}")
    got = "a nested one" if value.is_nested else f"layout {value.layout}"
    raise TypeError(f"{name}: expected a strided tensor, got {got}")


def check_number(name: str, value: Any, positive: bool = False, index: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, (float, int)):
        raise TypeError(f"{at(name, index)}: expected a number, got {type(value).__name__}")
    # Not math.isfinite: torch.compile passes symbolic values. Also rejects integers beyond a float's range.
    if not abs(value) <= sys.float_info.max or (positive and value < SMALLEST):
        wanted = "a finite number greater than 0" if positive else "a finite number"
        if positive and 0 < value < SMALLEST:
            wanted = f"at least {SMALLEST:.3g}, float32's smallest normal number"
        raise ValueError(f"{at(name, index)}: expected {wanted}, got {value}")


def check_activation(activation: Any) -> None:
    if activation not in ACTIVATIONS:
        *names, last = map(repr, ACTIVATIONS)
        raise ValueError(f"activation: expected {', '.join(names)} or {last}, got {activation!r}")


def per_weight(name: str, value: Any, count: int, positive: bool = False) -> list[float]:
    """One number per weight, from a single number or a list."""
    if not isinstance(value, (list, tuple)):
        check_number(name, value, positive)
        return [value] * count
    values, low = check_list(name, value, count), SMALLEST if positive else -sys.float_info.max
    for i, each in enumerate(values):
        if type(each) is not float or not low <= each < math.inf:
            check_number(name, each, positive, i)
    return values


def check_list(name: str, value: Any, count: int | None = None) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name}: expected a list or tuple, got {type(value).__name__}")
    if count is not None and len(value) != count:
        raise ValueError(f"{name}: expected one for each of the {count} weights, got {len(value)}")
    return list(value)


def check_memory_format(memory_format: Any, rank: int | None = None) -> None:
    """rank: of the weight, which channels_last and channels_last_3d must match; None for a list of weights."""
    if not isinstance(memory_format, torch.memory_format):
        raise TypeError(f"memory_format: expected a torch.memory_format, got {type(memory_format).__name__}")
    wanted = CHANNELS_LAST_RANK.get(memory_format)
    if rank is not None and wanted is not None and rank != wanted:
        raise ValueError(f"memory_format: {memory_format} is for rank {wanted}, got a weight of rank {rank}")


def check_module(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")


def device_type(t: Tensor) -> str:
    """t.device.type, without the 4 us that it costs in a training loop."""
    return "cpu" if t.is_cpu else "cuda" if t.is_cuda else t.device.type


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The autocast dtype of this device type; None if autocast is disabled."""
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def untraced_autocast_dtype(device_type: str) -> torch.dtype | None:
    """`autocast_dtype` in a third of the time where autocast is off, but not for what torch.compile traces."""
    return autocast_dtype(device_type) if is_any_autocast_enabled() else None


def result_dtype(
    name: str, weight: Tensor, device_type: str, dtype: torch.dtype | None, index: int | None = None
) -> torch.dtype:
    """Dtype of the aligned weight: `dtype`, else the autocast dtype if enabled (not for float64), else the weight's."""
    own = weight.dtype
    if dtype is None:
        return own if own is torch.float64 else autocast_dtype(device_type) or own
    if dtype not in DTYPES:
        raise TypeError(f"dtype: expected {_FLOATS}, got {dtype}")
    if (dtype is torch.float64) != (own is torch.float64):
        raise ValueError(
            f"dtype: float64, and nothing else, goes to float64; got {dtype} for {at(name, index)} of {own}"
        )
    return dtype
