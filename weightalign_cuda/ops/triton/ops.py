"""The four ops in Triton: for CUDA tensors or, with TRITON_INTERPRET=1 set before the first import, for CPU tensors.
Imported only when used; the compiled library is not needed."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..layout import empty_in, empty_permuted, empty_result, padded_shape
from . import kernels
from .launch import InputWork, Launch, check, check_dtypes
from .memory_order import (
    copied_into,
    empty_in_order_of,
    have_same_order,
    transposed_columns,
    with_contiguous_filters,
)
from .tiling import check_preparation, input_work, is_from_result


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
    check_preparation(input.shape, padding, padding_mode, activation)
    prepared = empty_in(input, padded_shape(input.shape, padding), dtype, memory_format)
    work = input_work(input, prepared, None, input.shape, padding, padding_mode, activation)
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
    check_preparation(shape, padding, padding_mode, activation)
    check(sorted(input_order) == list(range(len(shape))), "input_order: want each dimension once")
    check((saved is None) == (activation == 0), "saved: want a tensor exactly if there is an activation")
    if saved is not None:
        is_result = is_from_result(activation)
        wanted, what = (list(grad_prepared.shape), "the prepared input") if is_result else (shape, "the input")
        check(list(saved.shape) == wanted, f"saved: want {what} for this activation")
        check(saved.device == grad_prepared.device, "saved: want the gradient's device")
        check_dtypes(saved.dtype, input_dtype)
    grad_input = empty_permuted(grad_prepared, shape, input_order, input_dtype)
    work = input_work(grad_prepared, grad_input, saved, shape, padding, padding_mode, activation)
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
        source, result = with_contiguous_filters(weight), empty_result(weight, dtype, memory_format)
        columns = transposed_columns(source, result)
        out = empty_in_order_of(source, dtype) if columns is None else result
        launch.add(source, None, out, gain, one_eps, scale, columns or 0)
        results.append(result)
        written.append(out)
    statistics = launch.per_filter(2)
    launch.run(kernels.forward, statistics)
    return copied_into(results, written), statistics


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
        source, result = with_contiguous_filters(weight), empty_result(weight, weight.dtype, torch.preserve_format)
        columns = transposed_columns(source, grad)
        if columns is None:
            grad, columns = empty_in_order_of(source, grad.dtype).copy_(grad), 0
        out = result if have_same_order(source, result) else empty_in_order_of(source, weight.dtype)
        launch.add(source, grad, out, gain, 0.0, scale, columns)
        results.append(result)
        written.append(out)
    launch.run(kernels.backward, statistics.contiguous(), grad_gains)
    return copied_into(results, written), grad_gains
