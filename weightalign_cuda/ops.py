"""The registered ops: schemas and fake kernels. The native library implements them for CPU and CUDA tensors; where it
does not, the reference does.

All take a list of weights, and a layer alone is a list of one. `statistics`, (filters of the whole list, 2), holds
mean and 1 / sqrt(n/2 * var + eps) of each filter, float32 (float64 for float64 weights); the gain gradients of the
whole list are one tensor (filters,) of the same dtype.

prepare_* do what align_* do and, in the same launch, prepare a convolution's input (N, C, spatial...): activation, cast
to `dtype`, padding, and layout: channels_last(_3d) if that is `memory_format` and fits the rank, else contiguous.
`padding` holds before and after for each spatial dimension; `padding_mode` and `activation` are the places of their
names in `reference_input`. `saved`: with relu the prepared input, with silu and gelu the input, else nothing.
`input_order`: the dimensions of the input's gradient, outermost first in memory.
"""

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

definitions = torch.library.Library(NAMESPACE, "DEF")
for _name, _schema in SCHEMAS.items():
    definitions.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    definitions.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")

align_forward = torch.ops.weightalign_cuda.align_forward.default
align_backward = torch.ops.weightalign_cuda.align_backward.default
prepare_forward = torch.ops.weightalign_cuda.prepare_forward.default
prepare_backward = torch.ops.weightalign_cuda.prepare_backward.default

library = _library.load()


@torch.library.register_fake(f"{NAMESPACE}::align_forward", lib=definitions)
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


@torch.library.register_fake(f"{NAMESPACE}::align_backward", lib=definitions)
def _align_backward_fake(
    grads: list[Tensor],
    weights: list[Tensor],
    gains: list[Tensor | None],
    statistics: Tensor,
    scales: list[float],
) -> tuple[list[Tensor], Tensor]:
    rows = sum(w.shape[0] for w in weights)
    return [empty_result(w, w.dtype, torch.preserve_format) for w in weights], statistics.new_empty(rows)


@torch.library.register_fake(f"{NAMESPACE}::prepare_forward", lib=definitions)
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


@torch.library.register_fake(f"{NAMESPACE}::prepare_backward", lib=definitions)
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
