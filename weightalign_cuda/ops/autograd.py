"""Autograd kernels of the forward ops: one launch forward and one backward, for a list of weights and, with prepare, a
convolution's input."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..torch_private import are_functorch_transforms_active, below_autograd, is_forward_mode_active, is_legacy_batched
from . import direct, reference, schemas
from .exporters import wants_plain_operations
from .layout import memory_order
from .reference.activations import find
from .reference.align import align
from .reference.prepare import prepare_input_backward
from .schemas import OpSet
from .spent import MIN_VALUES, holders_of_spent


def align_forward(
    served: OpSet,
    weights: Sequence[Tensor],
    gains: Sequence[Tensor | None],
    eps: Sequence[float],
    scales: Sequence[float],
    dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> tuple[Sequence[Tensor], Tensor]:
    """The op align_forward, differentiable. Calling it directly skips one dispatcher round trip in eager mode."""
    if served is schemas.native and (results := align_directly(weights, gains, eps, scales, dtype, memory_format)):
        return results
    if _is_transformed():
        return reference.align_forward(weights, gains, eps, scales, dtype, memory_format)
    options = eps, scales, _NUMBERS.get(dtype, dtype), _FORMATS[memory_format]
    _check_length(weights, gains)
    try:
        with below_autograd():
            aligned, statistics = served.align_forward._op(weights, gains, *options)
    except RuntimeError as error:
        raise _typed(error) from None
    if not _wants_gradients(weights, gains):
        return aligned, statistics
    call = served, options, statistics, _versions((*weights, *gains))
    return _apply(call, aligned, None, *weights, *gains), statistics


def align_directly(
    weights: Sequence[Tensor],
    gains: Sequence[Tensor | None],
    eps: Sequence[float],
    scales: Sequence[float],
    dtype: torch.dtype | None,
    memory_format: torch.memory_format,
    memory: Sequence[Tensor | None] | None = None,
) -> tuple[Sequence[Tensor], Tensor] | None:
    """The native op align_forward, differentiable, without torch's dispatcher. None if it must not be left out, or if
    anything is wrong with the arguments. Results are written to the `memory`, of a former call, where they fit."""
    if not direct.is_open():
        return None
    number, format_ = _NUMBERS.get(dtype, -1), _FORMATS[memory_format]
    results = direct.forward(weights, gains, eps, scales, number, format_, memory)
    if results is None:
        return None
    aligned, statistics, versions = results
    if versions is None:
        return aligned, statistics
    call = schemas.native, (eps, scales, number, format_), statistics, versions
    return _apply(call, aligned, None, *weights, *gains), statistics


def prepare_forward(
    served: OpSet, input: Tensor, weights: Sequence[Tensor], gains: Sequence[Tensor | None], *options: Any
) -> tuple[Tensor, Sequence[Tensor], Tensor]:
    """The op prepare_forward, likewise."""
    if _is_transformed():
        return reference.prepare_forward(input, weights, gains, *options)
    eps, scales, dtype, memory_format, *rest = options
    options = eps, scales, _NUMBERS.get(dtype, dtype), _FORMATS[memory_format], *rest
    _check_length(weights, gains)
    try:
        with below_autograd():
            prepared, aligned, statistics = served.prepare_forward._op(input, weights, gains, *options)
    except RuntimeError as error:
        raise _typed(error) from None
    if _wants_gradients((input,), weights, gains):
        call = served, options, statistics, _versions((*weights, *gains))
        prepared, *aligned = _apply(call, (prepared, *aligned), input, *weights, *gains)
    return prepared, aligned, statistics


for _ops in (schemas.native, schemas.in_triton):
    for _function in (align_forward, prepare_forward):
        _op = getattr(_ops, _function.__name__)
        schemas.definitions.impl(_op, functools.partial(_function, _ops), "Autograd")


# `_op` of an overload is the same call without a Python frame. c10's enum values as ints save 1 us of argument parsing.
_NUMBERS = {None: None, torch.float16: 5, torch.float32: 6, torch.float64: 7, torch.bfloat16: 15}
_FORMATS = {torch.contiguous_format: 0, torch.preserve_format: 1, torch.channels_last: 2, torch.channels_last_3d: 3}


def _check_length(weights: Sequence[Tensor], gains: Sequence[Tensor | None]) -> None:
    """As autograd takes both lists as one."""
    if len(gains) != len(weights):
        raise RuntimeError(f"gains: want one gain or None for each of the {len(weights)} weights, got {len(gains)}")


def _typed(error: RuntimeError) -> RuntimeError:
    """The error that PyTorch's own operations raise if memory runs out: the stable ABI knows RuntimeError alone."""
    is_out_of_memory = type(error) is RuntimeError and "CUDA out of memory" in str(error)
    return torch.OutOfMemoryError(str(error)) if is_out_of_memory else error


def _is_transformed() -> bool:
    """Whether a torch.func transform, forward-mode AD or an exporter is active: they need PyTorch's own operations."""
    return are_functorch_transforms_active() or is_forward_mode_active() or wants_plain_operations()


def _wants_gradients(*lists: Sequence[Tensor | None]) -> bool:
    if torch.is_grad_enabled():
        for tensors in lists:
            for t in tensors:
                if t is not None and t.requires_grad:
                    return True
    return False


def _versions(tensors: Sequence[Tensor | None]) -> tuple[int | None, ...]:
    return tuple([None if t is None else t._version for t in tensors])


# A call of a forward op, for its backward: (the ops of the backend; their arguments after the tensors, dtype and memory
# format as numbers; the statistics; the versions of weights and gains). A tuple, as any other object costs more.
_Call = tuple[Any, tuple[Any, ...], Tensor, Sequence[int | None]]


class _Fused(torch.autograd.Function):
    """align_forward or, with an input, prepare_forward; and its gradient."""

    @staticmethod
    def forward(
        ctx: Any, call: _Call, results: Sequence[Tensor], input: Tensor | None, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        """results: of the op, but its statistics, which as one more result of the Function would cost as much as the
        op. tensors: the weights, then as many gains. They are not saved as autograd would do, which checks versions of
        all or none: a weight of the list that was written to after it was aligned matters only if its own result is
        used. Checkpointing has nothing to free here, either."""
        ctx.call, ctx.tensors = call, tensors
        if input is not None and ctx.needs_input_grad[2]:
            options = call[1]
            activation = find(options[-1])
            # Save the result if that suffices (relu): the convolution keeps it alive anyway.
            ctx.save_for_backward(activation and (results[0] if activation.is_from_result else input))
            ctx.preparation = (input.dtype, memory_order(input), *options[4:])
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        served, options, statistics, versions = ctx.call
        if served is schemas.native and direct.is_open():
            results = direct.backward(
                grads, ctx.needs_input_grad, ctx.tensors, versions, statistics, options[1], holders_of_spent, MIN_VALUES
            )
            if results is not None:
                return results
        return _backward(ctx, *grads)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    """By the op, for what is not usual."""
    served, options, statistics, versions = ctx.call
    _, _, input_wanted, *wanted = ctx.needs_input_grad
    tensors = ctx.tensors
    count = len(tensors) // 2
    grad_prepared = grad_input = None
    if len(grads) > count:
        grad_prepared, *grads = grads  # type: ignore[assignment]
    # Skip frozen weights and those whose result was not used; likewise the input.
    used = [i for i in range(count) if grads[i] is not None and (wanted[i] or wanted[count + i])]
    input_used = input_wanted and grad_prepared is not None
    _check_unchanged(used, tensors, versions)
    (saved,) = ctx.saved_tensors if input_used else (None,)
    if torch.is_grad_enabled():
        if input_used:
            grad_input = prepare_input_backward(grad_prepared, saved, *ctx.preparation)  # type: ignore[arg-type]
        return None, None, grad_input, *_differentiable_gradients(options, tensors, grads, used, wanted)
    if not (used or input_used):
        return (None,) * (3 + 2 * count)
    arguments = of_used(used, grads, tensors, statistics, options[1])
    given = (grad_prepared, *arguments[0]) if input_used else arguments[0]
    if _is_transformed() or any(map(is_legacy_batched, given)):
        served = reference
    try:
        with below_autograd():
            if input_used:
                results = served.prepare_backward(grad_prepared, saved, *arguments, *ctx.preparation)
                grad_input, grad_weights, grad_gains = results
            else:
                grad_weights, grad_gains = served.align_backward(*arguments)
            # Inside the context, where views of the gains' gradients cost less.
            return None, None, grad_input, *in_their_places(used, tensors, grad_weights, grad_gains)
    except RuntimeError as error:
        raise _typed(error) from None


# The C++ Function.apply, without its Python wrapper for torch.func transforms, under which it is not called.
_apply = super(torch.autograd.Function, _Fused).apply


def _check_unchanged(used: Sequence[int], tensors: Sequence[Tensor | None], versions: Sequence[int | None]) -> None:
    count = len(tensors) // 2
    for i in used:
        for name, place in (("weights", i), ("gains", count + i)):
            t = tensors[place]
            if t is not None and t._version != versions[place]:
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an inplace operation: "
                    f"{name}[{i}] is at version {t._version}; expected version {versions[place]}"
                )


def of_used(
    used: Sequence[int],
    grads: Sequence[Tensor | None],
    tensors: Sequence[Tensor | None],
    statistics: Tensor,
    scales: Sequence[float],
) -> tuple[Any, ...]:
    """(grads, weights, gains, statistics, scales) of the weights in `used`."""
    count = len(tensors) // 2
    weights, gains = tensors[:count], tensors[count:]
    if len(used) == count:
        return grads[:count], weights, gains, statistics, scales
    rows = statistics.split([w.shape[0] for w in weights])  # type: ignore[union-attr]
    statistics = torch.cat([rows[i] for i in used]) if used else statistics[:0]
    grads, weights, gains = ([t[i] for i in used] for t in (grads, weights, gains))
    return grads, weights, gains, statistics, [scales[i] for i in used]


def in_their_places(
    used: Sequence[int], tensors: Sequence[Tensor | None], grad_weights: Sequence[Tensor], grad_gains: Tensor
) -> list[Tensor | None]:
    """The gradients of all weights and gains, None for those not in `used`. (Autograd drops gradients that are not
    required, but accepts them only for tensors.)"""
    count = len(tensors) // 2
    results: list[Tensor | None] = [None] * (2 * count)
    rows = grad_gains.split([len(w) for w in grad_weights]) if len(used) != 1 else (grad_gains,)
    for i, grad_weight, row in zip(used, grad_weights, rows, strict=True):
        results[i], gain = grad_weight, tensors[count + i]
        if gain is not None:
            row = row if gain.dim() == 1 else row.view(gain.shape)
            results[count + i] = row if gain.dtype is row.dtype else row.to(gain.dtype)
    return results


def _differentiable_gradients(
    options: tuple[Any, ...],
    tensors: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    used: Sequence[int],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients under create_graph: through the reference, which PyTorch can differentiate again."""
    eps, scales, number = options[:3]
    dtype = next(dtype for dtype, its_number in _NUMBERS.items() if its_number == number) or tensors[0].dtype  # type: ignore[union-attr]
    count = len(tensors) // 2
    if not used:
        return [None] * (2 * count)
    with torch.enable_grad():
        aligned = [
            align(tensors[i], tensors[count + i], eps[i], scales[i], dtype, torch.preserve_format)[0]  # type: ignore[arg-type]
            for i in used
        ]
    inputs = [t for t, is_wanted in zip(tensors, wanted, strict=True) if is_wanted]
    outside = [grads[i] for i in used]
    found = iter(torch.autograd.grad(aligned, inputs, outside, create_graph=True, allow_unused=True))  # type: ignore[arg-type]
    return [next(found) if is_wanted else None for is_wanted in wanted]
