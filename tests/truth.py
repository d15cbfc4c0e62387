"""Expected results and allowed errors: the formula in float64, and tolerances derived from unit roundoffs.

Written from the formula, independently of weightalign_cuda's reference. (A separate module, because there are two
conftest.py, only one of which can be imported by name.)
"""

import torch
import torch.nn.functional as F

import weightalign_cuda as wa
from weightalign_cuda.ops.reference import activations

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
DTYPES = (F32, F16, BF16, F64)
PAIRS = [(w, r) for w in DTYPES for r in DTYPES if (w == F64) == (r == F64)]  # dtypes of weight and result
EPS = 1e-5
# Names of activations -> PyTorch's functions.
ACTIVATIONS = {name: getattr(F, name) if name else torch.clone for name in activations.ACTIVATIONS}

# Tolerances, in unit roundoffs u of the dtype of sums (float32; float64 for float64 weights):
# - a sum: no backend adds more than 128 values one after another (the CPU's float64 lanes; the rest is trees and
#   doubles). Roundings go up as often as down, so they come to about sqrt(128) u of the sum of magnitudes; twice that.
# - the aligned weight, relative to its filter's largest: the mean (a sum), half of the variance's (a sum under a root),
#   and two subtractions, the stored slope and the product.
# - its gradient, relative to the sizes of its terms (see `sizes`): the same sums, and two more operations.
# - the gain's gradient, relative to the magnitudes it sums: as the aligned weight.
# Then one rounding to the result's dtype: its u of the value, or half the spacing of its subnormals.
SUM = 2 * 128**0.5
ALIGNED = 4 + 1.5 * SUM
GRADIENT = 6 + 1.5 * SUM


def roundoff(dtype):
    return torch.finfo(dtype).eps / 2


def tolerance(terms, size, truth, dtype, sum_dtype):
    """Largest error allowed: `terms` roundoffs of `size` in the sums, and one rounding of the true value to `dtype`."""
    computed = terms * roundoff(sum_dtype) * size
    subnormal = torch.finfo(dtype).smallest_normal * roundoff(dtype)
    return computed + (roundoff(dtype) * (truth.abs() + computed)).clamp(min=subnormal)


def over_filters(reduce, t):
    """reduce(t, dim) over the values of each filter, kept as dimensions of size 1."""
    return reduce(t.flatten(1), 1).reshape((t.shape[0],) + (1,) * (t.dim() - 1))


def variance(d):
    """Biased, (K, 1), of deviations (K, n). Tensor.var adds one value after another: for long filters its float64 error
    would exceed that of the results to be checked."""
    return d.square().mean(1, keepdim=True)


def formula(weight, gain=None, eps=EPS, scale=1.0):
    """scale * gain * (w - mean) / sqrt(n/2 * var + eps) in the weight's own dtype."""
    w = weight.flatten(1)
    d = w - w.mean(1, keepdim=True)
    aligned = scale * d / (w.shape[1] / 2 * variance(d) + eps).sqrt()
    return (aligned if gain is None else aligned * gain[:, None]).view(weight.shape)


def shifted(weight):
    """The weight in float64, minus the first value of each filter, which does not change the result but avoids
    cancellation in `w - mean` for large means (which float64 weights would otherwise have in the truth itself)."""
    w = weight.detach().double().flatten(1)
    return (w - w[:, :1]).view(weight.shape)


def true_results(weight, gain, grad, eps=EPS, scale=1.0):
    """Aligned weight, gradients of weight and gain (None without one) in float64, by autograd of the formula."""
    w = shifted(weight).requires_grad_()
    g = None if gain is None else gain.detach().double().requires_grad_()
    aligned = formula(w, g, eps, scale)
    grads = torch.autograd.grad(aligned, [w] if g is None else [w, g], grad.detach().double())
    return (aligned.detach(), *grads, *([None] if g is None else []))


def sizes(weight, gain, grad, eps, scale):
    """Magnitudes of the terms of each result before they cancel, for each filter:

    - aligned weight: largest |slope d|
    - d w = slope * (G - mean(G) - x * sum(G x) / 2): largest |slope G| + |slope x sum(|G x|) / 2|
    - d gain = scale * sum(G x): |scale| sum(|G x|)

    Below the smallest normal number of the sums' dtype values err as if they were it.
    """
    w, grad = shifted(weight), grad.detach().double()
    var = over_filters(lambda t, dim: variance(t - t.mean(dim, keepdim=True)), w)
    rstd = 1 / (w.shape[1:].numel() / 2 * var + eps).sqrt()
    slope = abs(scale) * rstd
    if gain is not None:
        slope = slope * gain.detach().double().abs().view_as(slope)
    x = formula(w, None, eps).abs() + rstd * torch.finfo(sum_dtype(weight)).smallest_normal
    along = over_filters(torch.sum, grad.abs() * x)
    largest = over_filters(torch.amax, x)
    of_weight = slope * (over_filters(torch.amax, grad.abs()) + largest * along / 2)
    return largest * slope / rstd, of_weight, abs(scale) * along.flatten()


def sum_dtype(weight):
    return F64 if weight.dtype == F64 else F32


def judged(weight, gain, grad, dtype, *, eps=EPS, scale=1.0):
    """(name, truth, size of its terms, largest error allowed) of the aligned weight in `dtype` and of the gradients of
    weight and, if there is one, gain; grad is the incoming gradient."""
    truths, of = true_results(weight, gain, grad, eps, scale), sizes(weight, gain, grad, eps, scale)
    names, terms = ("aligned", "gradient of weight", "gradient of gain"), (ALIGNED, GRADIENT, ALIGNED)
    dtypes = (dtype, weight.dtype, None if gain is None else gain.dtype)
    for i in range(2 if gain is None else 3):
        yield names[i], truths[i], of[i], tolerance(terms[i], of[i], truths[i], dtypes[i], sum_dtype(weight))


def distance(result, truth):
    """|result - truth|; 0 where both are NaN. Infinity counts as the number after the largest of result's dtype, and so
    does any truth beyond that."""
    largest = torch.finfo(result.dtype).max * (1 + roundoff(result.dtype))
    error = result.double().clamp(-largest, largest) - truth.clamp(-largest, largest)
    return error.abs().masked_fill(result.isnan() & truth.isnan(), 0)


def is_near(result, truth, bound):
    error = distance(result, truth)
    return bool(((error <= bound) | (error == 0)).all())  # the bound is NaN where the truth is


def assert_near(name, result, truth, bound):
    excess = (distance(result, truth) / bound).max()
    assert is_near(result, truth, bound), f"{name}: error up to {excess:.3g} times what is allowed"


def assert_right(weight, gain, grad, aligned, grad_weight, grad_gain=None, *, eps=EPS, scale=1.0):
    """Checks values and dtypes of aligned weight and gradients; grad is the incoming gradient."""
    assert grad_weight.dtype == weight.dtype
    assert gain is None or grad_gain.dtype == gain.dtype
    results = aligned, grad_weight, *(() if gain is None else (grad_gain,))
    judgements = judged(weight, gain, grad, aligned.dtype, eps=eps, scale=scale)
    for result, (name, truth, _, bound) in zip(results, judgements, strict=True):
        assert_near(name, result, truth, bound)


def check_align(weight, gain=None, grad=None, *, eps=EPS, scale=1.0, **kwargs):
    """Runs and checks wa.align forward and backward; returns the aligned weight and the gradients (as returned by the
    backward: .grad would have the parameter's strides in any case)."""
    weight = weight.detach().requires_grad_()
    gain = None if gain is None else gain.detach().requires_grad_()
    aligned = wa.align(weight, gain, eps=eps, scale=scale, **kwargs)
    assert aligned.dtype == (kwargs.get("dtype") or weight.dtype)
    if grad is None:
        grad = normal(*weight.shape, seed=7, device=weight.device).to(aligned.dtype)
    grads = torch.autograd.grad(aligned, [weight] if gain is None else [weight, gain], grad)
    assert_right(weight, gain, grad, aligned, *grads, eps=eps, scale=scale)
    return (aligned.detach(), *grads)


def normal(*shape, seed=0, mean=0.0, std=1.0, dtype=F32, device="cpu"):
    """The same random numbers on every device."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return (values * std + mean).to(device, dtype)


def dense(t, order):
    """A copy of t whose dimensions have this order in memory, outermost first."""
    order = list(order)
    inverse = [order.index(d) for d in range(t.dim())]
    return t.permute(order).contiguous().permute(inverse)


def name(value):
    """Parameter ids: short names of dtypes and memory formats."""
    return str(value).removeprefix("torch.") if isinstance(value, (torch.dtype, torch.memory_format)) else None
