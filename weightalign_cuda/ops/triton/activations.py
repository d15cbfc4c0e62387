# mypy: ignore-errors
"""Activations of a convolution's input in Triton. Each returns its value and its derivative at x; the compiler drops
what a kernel does not use. A kernel takes one of them as a constexpr."""

import triton
import triton.language as tl


@triton.jit
def relu(x):
    """The derivative is the same function of the result."""
    return tl.where(x < 0, 0.0, x), tl.where(x <= 0, 0.0, 1.0).to(x.dtype)


@triton.jit
def silu(x):
    e = 1 + tl.exp(-x)
    s = 1 / e
    return x / e, s * (1 + x * (1 - s))


@triton.jit
def gelu(x):
    """Exact, with erf."""
    twice_phi = 1 + tl.erf(x * 0.7071067811865476)
    return 0.5 * x * twice_phi, 0.5 * twice_phi + x * tl.exp(x * x * -0.5) * 0.3989422804014327


@triton.jit
def hardswish(x):
    gate = x + 3
    gate = tl.where(gate < 0, 0.0, tl.where(gate > 6, 6.0, gate))
    derivative = tl.where(x <= -3, 0.0, tl.where(x >= 3, 1.0, x * 0.3333333333333333 + 0.5))
    return x * gate * 0.16666666666666666, derivative


ACTIVATIONS = (None, relu, silu, gelu, hardswish)  # indexed by the ops' numbers
