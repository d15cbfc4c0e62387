"""The registered ops: schemas, fake kernels, autograd. The native library implements them for CPU and CUDA tensors;
where it does not, the reference does.

Both take a list of weights, and a layer alone is a list of one. `statistics`, (filters of the whole list, 2), holds
mean and 1 / sqrt(n/2 * var + eps) of each filter, float32 (float64 for float64 weights); the gain gradients of the
whole list are one tensor (filters,) of the same dtype.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _library, reference
from ._layout import empty_in, empty_result, padded_shape, statistics_dtype

NAMESPACE = "weightalign_cuda"
SCHEMAS = {
    "align_forward": "(Tensor[] weights, Tensor?[] gains, float[] eps, float[] scales, ScalarType dtype, "
    "MemoryFormat memory_format) -> (Tensor[] aligned, Tensor statistics)",
    "align_backward": "(Tensor[] grads, Tensor[] weights, Tensor?[] gains, Tensor statistics, float[] scales) -> "
    "(Tensor[] grad_weights, Tensor grad_gains)",
    "prepare_forward": "(Tensor input, Tensor[] weights, Tensor?[] gains, float[] eps, float[] scales, "
    "ScalarType dtype, MemoryFormat memory_format, int[] padding, int padding_mode, int activation) -> "
    "(Tensor prepared, Tensor[] aligned, Tensor statistics)",
    "prepare_backward": "(Tensor grad_prepared, Tensor? saved, Tensor[] grads, Tensor[] weights, Tensor?[] gains, "
    "Tensor statistics, float[] scales, ScalarType input_dtype, int[] input_order, int[] padding, int padding_mode, "
    "int activation) -> (Tensor grad_input, Tensor[] grad_weights, Tensor grad_gains)",
}

_definitions = torch.library.Library(NAMESPACE, "DEF")
for _name, _schema in SCHEMAS.items():
    _definitions.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    _definitions.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")

align_forward = torch.ops.weightalign_cuda.align_forward.default
align_backward = torch.ops.weightalign_cuda.align_backward.default
prepare_forward = torch.ops.weightalign_cuda.prepare_forward.default
prepare_backward = torch.ops.weightalign_cuda.prepare_backward.default

library = _library.load()

_below_autograd = torch._C._AutoDispatchBelowAutograd


@torch.library.register_fake(f"{NAMESPACE}::align_forward", lib=_definitions)
def _align_forward_fake(
    weights: list[Tensor],
    gains: list[Tensor | None],
    eps: list[float],
    scales: list[float],
    dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> tuple[list[Tensor], Tensor]:
    rows, first = sum(w.shape[0] for w in weights), weights[0]
    statistics = first.new_empty((rows, 2), dtype=statistics_dtype(first.dtype))
    return [empty_result(w, dtype, memory_format) for w in weights], statistics


@torch.library.register_fake(f"{NAMESPACE}::align_backward", lib=_definitions)
def _align_backward_fake(
    grads: list[Tensor],
    weights: list[Tensor],
    gains: list[Tensor | None],
    statistics: Tensor,
    scales: list[float],
) -> tuple[list[Tensor], Tensor]:
    rows = sum(w.shape[0] for w in weights)
    return [empty_result(w, w.dtype, torch.preserve_format) for w in weights], statistics.new_empty(rows)


@torch.library.register_fake(f"{NAMESPACE}::prepare_forward", lib=_definitions)
def _prepare_forward_fake(
    input: Tensor,
    weights: list[Tensor],
    gains: list[Tensor | None],
    eps: list[float],
    scales: list[float],
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    padding: list[int],
    padding_mode: int,
    activation: int,
) -> tuple[Tensor, list[Tensor], Tensor]:
    prepared = empty_in(padded_shape(input.shape, padding), dtype, input.device, memory_format)
    return prepared, *_align_forward_fake(weights, gains, eps, scales, dtype, memory_format)


@torch.library.register_fake(f"{NAMESPACE}::prepare_backward", lib=_definitions)
def _prepare_backward_fake(
    grad_prepared: Tensor,
    saved: Tensor | None,
    grads: list[Tensor],
    weights: list[Tensor],
    gains: list[Tensor | None],
    statistics: Tensor,
    scales: list[float],
    input_dtype: torch.dtype,
    input_order: list[int],
    padding: list[int],
    padding_mode: int,
    activation: int,
) -> tuple[Tensor, list[Tensor], Tensor]:
    shape = padded_shape(grad_prepared.shape, padding, -1)
    grad_input = torch.empty_permuted(shape, input_order, dtype=input_dtype, device=grad_prepared.device)
    return grad_input, *_align_backward_fake(grads, weights, gains, statistics, scales)


class _Align(torch.autograd.Function):
    """align_forward with align_backward as its derivative: one launch each for the whole list."""

    @staticmethod
    def forward(ctx: Any, options: tuple[Any, ...], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        """options: the op's arguments after the tensors, which are the weights and as many gains."""
        count = len(tensors) // 2
        with _below_autograd():
            aligned, statistics = align_forward(tensors[:count], tensors[count:], *options)
        ctx.save_for_backward(*tensors, statistics)
        ctx.options = options
        ctx.mark_non_differentiable(statistics)
        ctx.set_materialize_grads(False)
        return (*aligned, statistics)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        *tensors, statistics = ctx.saved_tensors
        count, wanted = len(tensors) // 2, ctx.needs_input_grad[1:]
        # Frozen weights, and those whose result nobody used, take no part.
        used = [i for i in range(count) if grads[i] is not None and (wanted[i] or wanted[count + i])]
        results: list[Tensor | None] = [None] * (2 * count)
        if not used:
            return None, *results
        if torch.is_grad_enabled():
            return None, *_differentiable_gradients(ctx.options, tensors, grads, used, wanted)
        weights, gains, scales = tensors[:count], tensors[count:], ctx.options[1]
        used_grads: Sequence[Tensor | None] = grads[:count]
        if len(used) < count:
            per_weight = statistics.split([w.shape[0] for w in weights])
            statistics = torch.cat([per_weight[i] for i in used])
            used_grads, weights, gains, scales = ([t[i] for i in used] for t in (grads, weights, gains, scales))
        with _below_autograd():
            grad_weights, grad_gains = align_backward(used_grads, weights, gains, statistics, scales)
        rows = grad_gains.split([w.shape[0] for w in weights]) if len(used) > 1 else (grad_gains,)
        # Autograd drops what is not wanted, as long as it belongs to a tensor.
        for i, gain, grad_weight, row in zip(used, gains, grad_weights, rows, strict=True):
            results[i] = grad_weight
            if gain is not None:
                results[count + i] = row if gain.dtype is row.dtype else row.to(gain.dtype)
        return None, *results


def _differentiable_gradients(
    options: tuple[Any, ...],
    tensors: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    used: Sequence[int],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """The backward under create_graph: through the reference, which PyTorch can differentiate again."""
    eps, scales, dtype, _ = options
    count = len(tensors) // 2
    with torch.enable_grad():
        aligned = [
            reference.align(tensors[i], tensors[count + i], eps[i], scales[i], dtype, torch.preserve_format)[0]  # type: ignore[arg-type]
            for i in used
        ]
    inputs = [t for t, is_wanted in zip(tensors, wanted, strict=True) if is_wanted]
    outside = [grads[i] for i in used]
    found = iter(torch.autograd.grad(aligned, inputs, outside, create_graph=True, allow_unused=True))  # type: ignore[arg-type]
    return [next(found) if is_wanted else None for is_wanted in wanted]


def align_with_autograd(
    weights: Sequence[Tensor], gains: Sequence[Tensor | None], *options: Any
) -> tuple[Sequence[Tensor], Tensor]:
    """align_forward as the Autograd key sees it. Called directly, it spares eager code a way through the dispatcher."""
    if torch.is_grad_enabled():
        for t in (*weights, *gains):
            if t is not None and t.requires_grad:
                *aligned, statistics = _Align.apply(options, *weights, *gains)
                return aligned, statistics
    with _below_autograd():
        return align_forward(weights, gains, *options)


_definitions.impl("align_forward", align_with_autograd, "Autograd")
