"""Gradients that are spent once the backward has read them: as nobody else holds them, the gradient of the weight may
be written over them. In each step of training that saves fresh memory of the size of all weights, and its page faults
(benchmarks/NOTES.md). csrc/common/tensor_holders.h says who can hold a tensor."""

import functools
from typing import Any

import torch
from torch import Tensor

from . import direct

# Smaller ones lie in memory that malloc does not give back; the questions about each take as long as that would save.
MIN_VALUES = 32768


@functools.cache
def holders_of_spent() -> tuple[int, ...]:
    """Of a gradient that only the running backward holds. How many references that takes differs between versions of
    Python and torch, so it is counted: once, in the same way, for a gradient that nobody else can have."""
    counted: list[tuple[int, ...]] = []

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            counted.append(direct.holders(grads))
            return grads[0]

    with torch.inference_mode(False), torch.enable_grad():
        x = torch.ones(1, dtype=torch.float32, device="cpu", requires_grad=True)
        (Probe.apply(x) * 2).sum().backward()
    (spent,) = counted
    return spent
