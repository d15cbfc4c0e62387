"""The registered ops: schemas and fake kernels, in two sets. The native library implements the first one for CPU and
CUDA tensors, otherwise the reference does. The second, triton_*, belongs to the Triton backend. The backward uses the
set of the forward, in compiled and exported graphs, too.

All take a list of weights; a single layer is a list of one. `statistics`, (filters of the whole list, 2), holds mean
and 1 / sqrt(n/2 * var + eps) of each filter, float32 (float64 for float64 weights); the gain gradients of the whole
list are one tensor (filters,) of the same dtype.

prepare_* do what align_* do and, in the same launch, prepare a convolution's input (N, C, spatial...): activation, cast
to `dtype`, padding, and layout: channels_last(_3d) if that is `memory_format` and fits the rank, else contiguous.
`padding` holds before and after for each spatial dimension; `padding_mode` and `activation` are indices into
`reference.prepare.PADDING_MODES` and `reference.activations.ACTIVATIONS`. `saved`: what the activation's derivative is
computed from, the prepared input or the input; None without an activation.
`input_order`: the dimensions of the input's gradient, outermost first in memory.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..torch_private import tree_leaves, tree_map_only
from . import native_library, reference
from .installed import NAMESPACE
from .layout import empty_in, empty_permuted, empty_result, padded_shape, statistics_dtype

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


class OpSet(NamedTuple):
    align_forward: Any
    align_backward: Any
    prepare_forward: Any
    prepare_backward: Any


def _in_triton(name: str) -> Callable[..., Any]:
    def implementation(*arguments: Any) -> Any:
        from .triton import ops  # lazily: Triton may be missing, and is slow to import

        return getattr(ops, name)(*arguments)

    return implementation


definitions = torch.library.Library(NAMESPACE, "DEF")


def _define(prefix: str, implementation: Callable[[str], Callable[..., Any]]) -> OpSet:
    for name, schema in SCHEMAS.items():
        definitions.define(prefix + name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        definitions.impl(prefix + name, implementation(name), "CompositeExplicitAutograd")
    return OpSet(*(getattr(getattr(torch.ops, NAMESPACE), prefix + name).default for name in OpSet._fields))


native = _define("", lambda name: getattr(reference, name))
in_triton = _define("triton_", _in_triton)


def _after(change: Callable[[Tensor], Tensor], op: Any) -> Callable[..., Any]:
    return lambda *arguments: op(*tree_map_only(Tensor, change, arguments))


# For tensors whose values are not those in memory: negated ones, zeros without memory. What torch itself does for all
# ops passes over tensors in a list of optional ones, such as the gains.
for _op in (*native, *in_triton):
    definitions.impl(_op, _after(Tensor.resolve_neg, _op), "Negative")
    definitions.impl(_op, _after(lambda t: torch.zeros_like(t) if t._is_zerotensor() else t, _op), "ZeroTensor")

library = native_library.load()


def _fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(kernel: Callable[..., Any]) -> Callable[..., Any]:
        def checked(*arguments: Any) -> Any:
            # A meta tensor among others brings them here.
            if len(devices := {t.device for t in tree_leaves(arguments) if isinstance(t, Tensor)}) > 1:
                raise RuntimeError(f"{name}: want tensors of one device, got {', '.join(map(str, devices))}")
            return kernel(*arguments)

        for op in (getattr(native, name), getattr(in_triton, name)):
            torch.library.register_fake(op, checked, lib=definitions)
        return kernel

    return register


@_fake("align_forward")
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


@_fake("align_backward")
def _align_backward_fake(
    grads: list[Tensor],
    weights: list[Tensor],
    gains: list[Tensor | None],
    statistics: Tensor,
    scales: list[float],
) -> tuple[list[Tensor], Tensor]:
    rows = sum(w.shape[0] for w in weights)
    return [empty_result(w, w.dtype, torch.preserve_format) for w in weights], statistics.new_empty(rows)


@_fake("prepare_forward")
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
    prepared = empty_in(input, padded_shape(input.shape, padding), dtype, memory_format)
    return prepared, *_align_forward_fake(weights, gains, eps, scales, dtype, memory_format)


@_fake("prepare_backward")
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
    grad_input = empty_permuted(grad_prepared, shape, input_order, input_dtype)
    return grad_input, *_align_backward_fake(grads, weights, gains, statistics, scales)
