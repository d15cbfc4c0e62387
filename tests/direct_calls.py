"""Calls of `ops.direct.backward`, as the backward of an autograd.Function makes them."""

import sys

import torch

from weightalign_cuda.ops import direct

OTHERS = 3  # arguments of the autograd.Function before the weights


def backward_arguments(grads, weights, gains, statistics, scales):
    """Of a backward for which each weight and gain is as in the forward and wants a gradient, the incoming one being
    kept by somebody."""
    tensors = [*weights, *gains]
    wanted = [False] * OTHERS + [True] * len(tensors)
    versions = [t if t is None else t._version for t in tensors]
    return grads, wanted, tensors, versions, statistics, scales, None, sys.maxsize


NAMES = "grads", "wanted", "tensors", "versions", "statistics", "scales", "holders_of_spent", "smallest"


def is_taken(arguments, **new):
    """Whether a call with these arguments, some of them changed, is not declined."""
    with torch.no_grad():
        return direct.backward(*(dict(zip(NAMES, arguments, strict=True)) | new).values()) is not None


def backward(*arguments):
    """Gradients of the weights, then of the gains; None if the call is declined."""
    with torch.no_grad():
        results = direct.backward(*backward_arguments(*arguments))
    return results and results[OTHERS:]
