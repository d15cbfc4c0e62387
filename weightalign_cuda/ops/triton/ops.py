"""The four ops in Triton: for CUDA tensors or, with TRITON_INTERPRET=1 set before the first import, for CPU tensors.
Imported only when used; the compiled library is not needed."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..layout import empty_in, empty_permuted, empty_result, is_dense, memory_order, padded_shape
from ..reference.activations import find
from ..reference.prepare import PADDING_MODES, at_most
from . import kernels
from .activations import ACTIVATIONS
from .align_kernels import WIDTHS
from .launch import TYPES, InputWork, Launch, check, check_dtypes
from .prepare_kernels import FIELDS, TILE


def align_forward(
    weights: Sequence[Tensor],
    gains: Sequence[Tensor | None],
    eps: Sequence[float],
    scales: Sequence[float],
    dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> tuple[list[Tensor], Tensor]:
    """The op align_forward."""
    return _forward(InputWork(), weights, gains, eps, scales, dtype, memory_format)


def align_backward(
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    gains: Sequence[Tensor | None],
    statistics: Tensor,
    scales: Sequence[float],
) -> tuple[list[Tensor], Tensor]:
    """The op align_backward."""
    return _backward(InputWork(), grads, weights, gains, statistics, scales)


def prepare_forward(
    input: Tensor,
    weights: Sequence[Tensor],
    gains: Sequence[Tensor | None],
    eps: Sequence[float],
    scales: Sequence[float],
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    padding: Sequence[int],
    padding_mode: int,
    activation: int,
) -> tuple[Tensor, list[Tensor], Tensor]:
    """The op prepare_forward."""
    check_dtypes(input.dtype, dtype)
    _check_padding(input.shape, padding, padding_mode, activation)
    prepared = empty_in(input, padded_shape(input.shape, padding), dtype, memory_format)
    work = _input_work(input, prepared, None, input.shape, padding, padding_mode, activation)
    return prepared, *_forward(work, weights, gains, eps, scales, dtype, memory_format)


def prepare_backward(
    grad_prepared: Tensor,
    saved: Tensor | None,
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    gains: Sequence[Tensor | None],
    statistics: Tensor,
    scales: Sequence[float],
    input_dtype: torch.dtype,
    input_order: Sequence[int],
    padding: Sequence[int],
    padding_mode: int,
    activation: int,
) -> tuple[Tensor, list[Tensor], Tensor]:
    """The op prepare_backward."""
    shape = padded_shape(grad_prepared.shape, padding, -1) if len(padding) % 2 == 0 else []
    check_dtypes(grad_prepared.dtype, input_dtype)
    _check_padding(shape, padding, padding_mode, activation)
    check(sorted(input_order) == list(range(len(shape))), "input_order: want each dimension once")
    check((saved is None) == (activation == 0), "saved: want a tensor exactly if there is an activation")
    if saved is not None:
        is_result = _is_from_result(activation)
        wanted, what = (list(grad_prepared.shape), "the prepared input") if is_result else (shape, "the input")
        check(list(saved.shape) == wanted, f"saved: want {what} for this activation")
        check(saved.device == grad_prepared.device, "saved: want the gradient's device")
        check_dtypes(saved.dtype, input_dtype)
    grad_input = empty_permuted(grad_prepared, shape, input_order, input_dtype)
    work = _input_work(grad_prepared, grad_input, saved, shape, padding, padding_mode, activation)
    return grad_input, *_backward(work, grads, weights, gains, statistics, scales)


def _forward(
    work: InputWork,
    weights: Sequence[Tensor],
    gains: Sequence[Tensor | None],
    eps: Sequence[float],
    scales: Sequence[float],
    dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> tuple[list[Tensor], Tensor]:
    check(len(eps) == len(scales) == len(weights), "eps, scales: want one for each weight")
    launch = Launch(weights, gains, work)
    check_dtypes(launch.dtype, dtype)
    results, written = [], []
    for weight, gain, one_eps, scale in zip(weights, gains, eps, scales, strict=True):
        source, result = _by_filters(weight), empty_result(weight, dtype, memory_format)
        columns = _columns(source, result)
        out = _empty_beside(source, dtype) if columns is None else result
        launch.add(source, None, out, gain, one_eps, scale, columns or 0)
        results.append(result)
        written.append(out)
    statistics = launch.per_filter(2)
    launch.run(kernels.forward, statistics)
    return _copied(written, results), statistics


def _backward(
    work: InputWork,
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    gains: Sequence[Tensor | None],
    statistics: Tensor,
    scales: Sequence[float],
) -> tuple[list[Tensor], Tensor]:
    check(len(grads) == len(scales) == len(weights), "grads, scales: want one for each weight")
    launch = Launch(weights, gains, work)
    grad_gains = launch.per_filter()
    like_these = statistics.dtype == grad_gains.dtype and statistics.device == launch.device
    check(like_these and statistics.shape == (launch.filters, 2), "statistics: want those of the forward")
    results, written = [], []
    for grad, weight, gain, scale in zip(grads, weights, gains, scales, strict=True):
        check(grad.shape == weight.shape and grad.device == launch.device, "grads: want the shape of the weight")
        check_dtypes(weight.dtype, grad.dtype)
        source, result = _by_filters(weight), empty_result(weight, weight.dtype, torch.preserve_format)
        columns = _columns(source, grad)
        if columns is None:
            grad, columns = _empty_beside(source, grad.dtype).copy_(grad), 0
        out = result if _lie_alike(source, result) else _empty_beside(source, weight.dtype)
        launch.add(source, grad, out, gain, 0.0, scale, columns)
        results.append(result)
        written.append(out)
    launch.run(kernels.backward, statistics.contiguous(), grad_gains)
    return _copied(written, results), grad_gains


def _by_filters(weight: Tensor) -> Tensor:
    """The weight, or a copy of it, with each filter contiguous in memory, its dimensions in any order."""
    if weight.is_contiguous():
        return weight
    filters = weight.shape[0]
    has_contiguous_filters = is_dense(weight) and (filters == 1 or weight.stride(0) * filters == weight.numel())
    return weight if has_contiguous_filters else weight.contiguous()


def _empty_beside(source: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(source.shape, source.stride(), dtype=dtype, device=source.device)


def _copied(written: Sequence[Tensor], results: list[Tensor]) -> list[Tensor]:
    """The results; those whose layout the kernel could not write are copied into it."""
    for out, result in zip(written, results, strict=True):
        if out is not result:
            result.copy_(out)
    return results


def _lie_alike(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of the same shape have the same order in memory."""
    strides = a.stride(), b.stride()
    return strides[0] == strides[1] or all(n == 1 or i == j for n, i, j in zip(a.shape, *strides, strict=True))


def _columns(source: Tensor, aligned: Tensor) -> int | None:
    """`Task.columns`: 0 if both have the same order in memory, None if the kernels do not support that of `aligned`."""
    if _lie_alike(source, aligned):
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


def _check_padding(shape: Sequence[int], padding: Sequence[int], padding_mode: int, activation: int) -> None:
    """shape: of the input."""
    rank = len(shape)
    check(3 <= rank <= 5, f"input: want rank 3 to 5, got rank {rank}")
    check(len(padding) == 2 * (rank - 2), "padding: want two numbers for each spatial dimension")
    check(min(padding) >= 0 and min(shape) >= 0, f"padding: want numbers from 0 to the whole of a gradient: {padding}")
    check(0 <= padding_mode <= 3, f"padding_mode: want 0 to 3, got {padding_mode}")
    check(0 <= activation < len(ACTIVATIONS), f"activation: want 0 to {len(ACTIVATIONS) - 1}, got {activation}")
    for size, *ends in zip(shape[2:], padding[::2], padding[1::2], strict=True):
        most = at_most(PADDING_MODES[padding_mode], size, max(ends))
        check(max(ends) <= most, f"padding: too much for a dimension of {size} in this mode: {ends}")


def _input_work(
    source: Tensor,
    to: Tensor,
    saved: Tensor | None,
    shape: Sequence[int],
    padding: Sequence[int],
    padding_mode: int,
    activation: int,
) -> InputWork:
    """source: in the forward the input, in the backward the gradient of the prepared input; shape: of the input."""
    if to.numel() == 0:
        return InputWork(source)
    batch, channels, *spatial = to.shape
    positions = math.prod(spatial)
    tile_channels = 4 if channels <= 4 else 32
    tile_positions = TILE // tile_channels
    check(positions < 2**31 - TILE, f"input: want less than 2^31 positions, got {positions}")
    tiles = -(-channels // tile_channels), -(-positions // tile_positions)
    saved_or_to = to if saved is None else saved
    absent = 3 - len(spatial)
    numbers = {
        "from": [source.data_ptr()],
        "to": [to.data_ptr()],
        "saved": [saved_or_to.data_ptr()],
        "channels": [channels],
        "channel_tiles": [tiles[0]],
        "position_tiles": [tiles[1]],
        "size": [1] * absent + list(shape[2:]),
        "before": [0] * absent + list(padding[::2]),
        "after": [0] * absent + list(padding[1::2]),
        "to_size": [1] * absent + spatial,
    }
    for name, t in (("from_strides", source), ("to_strides", to), ("saved_strides", saved_or_to)):
        numbers[name] = [*t.stride()[:2], *[0] * absent, *t.stride()[2:]]
    constants = {
        "FROM": TYPES[source.dtype],
        "TO": TYPES[to.dtype],
        "MODE": padding_mode,
        "ACTIVATION": ACTIVATIONS[activation],
        "FROM_BY_CHANNELS": _is_by_channels(source),
        "TO_BY_CHANNELS": _is_by_channels(to),
        "CHANNELS": tile_channels,
        "POSITIONS": tile_positions,
    }
    if saved is not None:
        constants |= {
            "SAVED": TYPES[saved.dtype],
            "SAVED_BY_CHANNELS": _is_by_channels(saved),
            "SAVED_IS_RESULT": _is_from_result(activation),
        }
    flat = tuple(number for name in list(FIELDS)[1:] for number in numbers[name])
    return InputWork(source, flat, batch * tiles[0] * tiles[1], tuple(constants.items()))


def _is_from_result(activation: int) -> bool:
    formula = find(activation)
    return formula is not None and formula.is_from_result


def _is_by_channels(t: Tensor) -> bool:
    """Whether the channels of a position are adjacent in memory."""
    return t.stride(1) == 1 and t.shape[1] > 1
