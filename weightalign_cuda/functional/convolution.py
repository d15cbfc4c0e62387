"""Convolutions on aligned weights: one launch aligns the weight and prepares the input, then torch convolves."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from ..ops.backend import run
from ..ops.exporters import wants_plain_operations
from ..ops.layout import CHANNELS_LAST_RANK, looks_channels_last
from ..ops.reference.activations import ACTIVATIONS
from .checks import (
    PLAIN,
    TENSORS,
    autocast_dtype,
    check_activation,
    check_gain,
    check_input,
    check_memory_format,
    check_number,
    check_weight,
    device_type,
    result_dtype,
)
from .dtensor import convolve_shards, is_sharded, prepare_shards
from .padding import (
    Pairs,
    check_padding_mode,
    check_padding_size,
    is_left_to_convolution,
    parse_padding,
    same_padding,
    same_tf_padding,
)


def prepare(
    input: Tensor,
    weight: Tensor,
    gain: Tensor | None = None,
    *,
    padding: Any = 0,
    padding_mode: str = "zeros",
    activation: str | None = None,
    eps: float = 1e-5,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.preserve_format,
) -> tuple[Tensor, Tensor]:
    """Prepares a convolution's input and aligns its weight in one kernel launch.

    The input becomes pad(cast(activation(input))) in the convolution's layout; the weight is aligned as by `align`
    (arXiv 2010.07160, eq. 10). The backward is one launch, too. Twice differentiable.

    DTensors, as input and weight must then both be, are prepared locally and keep their placements: the weight's as for
    `align`, the input's Replicate() or, along a dimension that is not padded here, Shard().

    Args:
        input: (N, C_in, spatial...) or (C_in, spatial...), of the weight's rank or one less; 1 to 3 spatial dimensions.
        weight: (C_out, C_in / groups, kernel...); float32, float16, bfloat16 or float64.
        gain: as for `align`.
        padding: an int, or for each spatial dimension an int or a (before, after) pair. Zero padding with before equal
            to after in all dimensions is left to the convolution: the result is unpadded. Any other padding is applied
            here, and the convolution's padding must be 0.
        padding_mode: "zeros", "reflect", "replicate" or "circular", within torch's limits on sizes.
        activation: None, "relu", "silu", "gelu" (exact, with erf) or "hardswish"; applied to the input first.
        eps: as for `align`.
        scale: as for `align`.
        dtype: of both results. Default: the autocast dtype if autocast is enabled for the device and the weight is not
            float64, else the dtype of input and weight, which must then be the same. float64 if and only if both are
            float64.
        memory_format: of both results. Default: channels_last(_3d) if either has such strides, as in torch's
            convolutions; else the input is contiguous and the weight keeps its strides.

    Returns:
        (prepared input, aligned weight). The input is returned unchanged if no activation, cast, padding or layout
        change is needed.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what was given, before anything runs.
    """
    if has_torch_function((input, weight, gain)):
        options: dict[str, Any] = {"padding": padding, "padding_mode": padding_mode, "activation": activation}
        options |= {"eps": eps, "scale": scale, "dtype": dtype, "memory_format": memory_format}
        return handle_torch_function(prepare, (input, weight, gain), input, weight, gain, **options)
    check_weight("weight", weight)
    pairs = parse_padding(padding, weight.dim() - 2)
    prepared, aligned, _ = prepare_convolution(
        input, weight, gain, pairs, padding_mode, activation, eps, scale, dtype, memory_format
    )
    return prepared, aligned


def prepare_convolution(
    input: Tensor,
    weight: Tensor,
    gain: Tensor | None,
    pairs: Pairs,
    padding_mode: str,
    activation: str | None,
    eps: float,
    scale: float,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.preserve_format,
    is_aligned: bool = False,
) -> tuple[Tensor, Tensor, list[int]]:
    """`prepare`, and the padding left to the convolution. A weight that is already aligned is returned unchanged."""
    check_input("input", input, weight)
    if gain is not None:
        check_gain("gain", gain, weight)
    check_number("eps", eps, positive=True)
    check_number("scale", scale)
    check_memory_format(memory_format, weight.dim())
    mode = check_padding_mode(padding_mode)
    check_activation(activation)
    device_type_ = device_type(weight)
    dtype = _common_dtype(input, weight, device_type_, dtype)
    are_sizes_known = not wants_plain_operations()
    if are_sizes_known:
        check_padding_size(pairs, padding_mode, input.shape[2 - weight.dim() :])
    if memory_format is torch.preserve_format and are_sizes_known:
        memory_format = _chosen_format(input, weight)
    is_batched = input.dim() == weight.dim()
    is_implicit = are_sizes_known and is_left_to_convolution(pairs, padding_mode)
    implicit_padding = [before if is_implicit else 0 for before, _ in pairs]
    explicit = [0 if is_implicit else n for pair in pairs for n in pair]
    are_plain = type(input) in TENSORS and type(weight) in TENSORS and type(gain) in PLAIN
    if not are_plain and is_sharded((input, weight, gain)):
        same: dict[str, Any] = {"pairs": pairs, "padding_mode": padding_mode, "activation": activation, "eps": eps}
        same |= {"scale": scale, "dtype": dtype, "memory_format": memory_format, "is_aligned": is_aligned}
        return *prepare_shards(prepare_convolution, input, weight, gain, explicit, **same), implicit_padding
    # Already aligned: pass an empty weight, so that only the input is prepared.
    raw, raw_gain = (weight.detach()[:0], None) if is_aligned else (weight, gain)
    weights = [raw], [raw_gain], [eps], [scale], dtype, memory_format
    batch = input if is_batched else input.unsqueeze(0)
    is_ready = activation is None and input.dtype is dtype and are_sizes_known and not any(explicit)
    if is_ready and _lies_in(batch, memory_format):
        return input, weight if is_aligned else run("align_forward", device_type_, *weights)[0][0], implicit_padding
    options = explicit, mode, ACTIVATIONS.index(activation)
    prepared, aligned, _ = run("prepare_forward", device_type_, batch, *weights, *options)
    return prepared if is_batched else prepared.squeeze(0), weight if is_aligned else aligned[0], implicit_padding


def _common_dtype(input: Tensor, weight: Tensor, device_type: str, dtype: torch.dtype | None) -> torch.dtype:
    result = result_dtype("weight", weight, device_type, dtype)
    alike = input.dtype is weight.dtype or (
        (input.dtype is torch.float64) == (weight.dtype is torch.float64)
        and (dtype is not None or autocast_dtype(device_type) is not None)
    )
    if not alike:
        raise ValueError(
            f"input: expected the weight's dtype {weight.dtype} (or dtype=, or autocast, for both but float64); "
            f"got {input.dtype}"
        )
    return result


def _chosen_format(input: Tensor, weight: Tensor) -> torch.memory_format:
    """channels_last(_3d) if either tensor is, as torch's convolutions choose."""
    for memory_format, rank in CHANNELS_LAST_RANK.items():
        images = [t for t in (weight, input) if weight.dim() == t.dim() == rank]
        if any(map(looks_channels_last, images)):
            return memory_format
    return torch.preserve_format


def _lies_in(input: Tensor, memory_format: torch.memory_format) -> bool:
    fits = CHANNELS_LAST_RANK.get(memory_format) == input.dim()
    return input.is_contiguous(memory_format=memory_format if fits else torch.contiguous_format)


def convolve(
    convolution: Callable[..., Tensor],
    spatial: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    gain: Tensor | None,
    padding_mode: str,
    activation: str | None,
    eps: float,
    scale: float,
    is_aligned: bool = False,
) -> Tensor:
    """torch's `convolution`, of `spatial` dimensions, after `prepare_convolution`."""
    if not is_aligned and has_torch_function(tensors := (input, weight, bias, gain)):
        public, sizes = (conv1d, conv2d, conv3d)[spatial - 1], (stride, padding, dilation, groups)
        options: dict[str, Any] = {"gain": gain, "padding_mode": padding_mode, "activation": activation}
        options |= {"eps": eps, "scale": scale}
        return handle_torch_function(public, tensors, input, weight, bias, *sizes, **options)
    check_weight("weight", weight)
    if weight.dim() != spatial + 2:
        raise ValueError(f"weight: expected rank {spatial + 2} for conv{spatial}d, got shape {tuple(weight.shape)}")
    if isinstance(padding, str):
        check_input("input", input, weight)
        strides, dilations = _per_dimension("stride", stride, spatial), _per_dimension("dilation", dilation, spatial)
        kernel = weight.shape[2:]
        if padding == "valid":
            pairs = [(0, 0)] * spatial
        elif padding == "same":
            pairs = same_padding(kernel, strides, dilations)
        elif padding == "same_tf":
            pairs = same_tf_padding(input.shape[-spatial:], kernel, strides, dilations)
        else:
            raise ValueError(f"padding: expected numbers, 'valid', 'same' or 'same_tf', got {padding!r}")
    else:
        pairs = parse_padding(padding, spatial)
    preparation = pairs, padding_mode, activation, eps, scale
    prepared, aligned, implicit_padding = prepare_convolution(input, weight, gain, *preparation, is_aligned=is_aligned)
    if type(aligned) not in TENSORS and is_sharded([aligned]):
        convolution = partial(convolve_shards, convolution, groups=groups)
    return convolution(prepared, aligned, bias, stride, implicit_padding, dilation, groups)


def _per_dimension(name: str, value: Any, count: int) -> Sequence[int]:
    values = [value] * count if isinstance(value, int) else value
    are_ints = isinstance(values, (list, tuple)) and all(isinstance(v, int) and v > 0 for v in values)
    if not are_ints or len(values) not in (1, count):
        raise ValueError(f"{name}: expected a positive int or {count} of them, got {value!r}")
    return list(values) * (count // len(values))


def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: Any = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    gain: Tensor | None = None,
    padding_mode: str = "zeros",
    activation: str | None = None,
    eps: float = 1e-5,
    scale: float = 1.0,
) -> Tensor:
    """`torch.nn.functional.conv1d` with the aligned weight, after `prepare` (arXiv 2010.07160, eq. 10).

    Of DTensors, the input may be sharded by batch, or else weight, gain and bias by filters, if groups is 1.

    Args:
        input: (N, C_in, L) or (C_in, L).
        weight: (C_out, C_in / groups, k), not aligned.
        bias: as in torch.
        stride: as in torch.
        padding: as for `prepare`, or "valid", "same" (torch's, stride 1) or "same_tf" (TensorFlow's, any stride).
        dilation: as in torch.
        groups: as in torch.
        gain: as for `align`.
        padding_mode: as for `prepare`.
        activation: as for `prepare`.
        eps: as for `align`.
        scale: as for `align`.

    Returns:
        (N, C_out, L_out) or (C_out, L_out).

    Raises:
        TypeError, ValueError: as for `prepare`.
        RuntimeError: from torch's convolution, for shapes that do not match.
    """
    options = gain, padding_mode, activation, eps, scale
    return convolve(F.conv1d, 1, input, weight, bias, stride, padding, dilation, groups, *options)


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: Any = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    gain: Tensor | None = None,
    padding_mode: str = "zeros",
    activation: str | None = None,
    eps: float = 1e-5,
    scale: float = 1.0,
) -> Tensor:
    """`conv1d` with two spatial dimensions: (N, C_in, H, W) and (C_out, C_in / groups, kH, kW)."""
    options = gain, padding_mode, activation, eps, scale
    return convolve(F.conv2d, 2, input, weight, bias, stride, padding, dilation, groups, *options)


def conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: Any = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    gain: Tensor | None = None,
    padding_mode: str = "zeros",
    activation: str | None = None,
    eps: float = 1e-5,
    scale: float = 1.0,
) -> Tensor:
    """`conv1d` with three spatial dimensions: (N, C_in, D, H, W) and (C_out, C_in / groups, kD, kH, kW)."""
    options = gain, padding_mode, activation, eps, scale
    return convolve(F.conv3d, 3, input, weight, bias, stride, padding, dilation, groups, *options)
