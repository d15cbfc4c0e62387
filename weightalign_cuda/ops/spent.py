"""Gradients that are spent once the backward has read them: as nobody else holds them, the gradient of the weight may
be written over them. In each step of training that saves fresh memory of the size of all weights, and its page faults
(benchmarks/NOTES.md)."""

import functools
import operator
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..torch_private import has_storage, storage_holders

# Smaller ones lie in memory that malloc does not give back; the questions about each take as long as that would save.
MIN_VALUES = 32768


def which_are_spent(grads: Sequence[Tensor]) -> list[bool]:
    """Of each gradient, the argument of the backward of an autograd.Function. Of CPU tensors only."""
    return [found is not None and all(map(operator.le, found, _holders_of_spent())) for found in _holders_of(grads)]


def _holders_of(grads: Sequence[Tensor]) -> list[tuple[int, ...] | None]:
    """Of each gradient whose memory is worth it."""
    return [
        _holders(grad)
        if grad.numel() >= MIN_VALUES
        and type(grad) is Tensor
        and grad.is_cpu
        and has_storage(grad)  # sparse and batched tensors have none
        else None
        for grad in grads
    ]


def _holders(grad: Tensor) -> tuple[int, ...]:
    """How many references there are to the tensor, in Python and in torch; then `storage_state`."""
    return sys.getrefcount(grad), grad._use_count(), *storage_state(grad)


def storage_state(t: Tensor) -> tuple[int, ...]:
    """How many references there are to the tensor's storage, in Python and in torch; whether the memory is not torch's
    own, as NumPy's, whether other processes see it, and whether it is not the tensor's whole memory."""
    storage = t.untyped_storage()
    return (
        sys.getrefcount(storage), storage_holders(storage._cdata),
        not storage.resizable(), storage.is_shared(), storage.nbytes() != t.nbytes,
    )  # fmt: skip


@functools.cache
def _holders_of_spent() -> tuple[int, ...]:
    """Of a gradient that only the running backward holds. How many references that takes differs between versions of
    Python and torch, so it is counted: once, in the same way, for a gradient that nobody else can have."""
    counted: list[tuple[int, ...] | None] = []

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            counted.extend(_holders_of(grads))
            return grads[0]

    with torch.inference_mode(False), torch.enable_grad():
        x = torch.ones(MIN_VALUES, dtype=torch.float32, device="cpu", requires_grad=True)
        (Probe.apply(x) * 2).sum().backward()
    (spent,) = counted
    assert spent is not None
    return spent
