"""Values and gradients of align, and properties that hold for any weight."""

import math

import pytest
import torch
import torch.nn.functional as F
from truth import BF16, DTYPES, F16, F32, F64, PAIRS, check_align, formula, name, normal

import weightalign_cuda as wa

SHAPES = {
    "linear": (10, 64),
    "conv1d": (8, 5, 3),
    "conv2d": (16, 8, 3, 3),
    "conv3d": (4, 3, 3, 3, 3),
    "depthwise": (32, 1, 3, 3),
    "one filter": (1, 37),
    "n=1": (5, 1, 1, 1),
    "stem": (64, 3, 7, 7),
    "n=4608": (6, 512, 3, 3),
    "n=20000": (3, 20000),
}


def he(*shape, device, dtype=F32, seed=0):
    """He-initialised weights."""
    return normal(*shape, std=(2 / math.prod(shape[1:])) ** 0.5, device=device, dtype=dtype, seed=seed)


@pytest.mark.parametrize(("dtype", "result_dtype"), PAIRS, ids=name)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values_and_gradients(backend, device, shape, dtype, result_dtype):
    gain = normal(shape[0], mean=1, std=0.3, seed=1, device=device)
    check_align(he(*shape, device=device, dtype=dtype), gain, dtype=result_dtype)


def near_midway(dtype):
    """float32 numbers midway between neighbours of dtype, and the floats next to those; and what each rounds to."""
    first = 0x0800 if dtype == BF16 else 0  # so that no product is subnormal in float32
    bits = torch.arange(first, 0x7800, 61, dtype=torch.int16)
    low, high = bits.view(dtype), (bits + 1).view(dtype)
    middle = (low.double() + high.double()).div(2).float()
    numbers = [middle, *(torch.nextafter(middle, side.float()) for side in (low, high))]
    return torch.cat(numbers), torch.cat([torch.where(bits % 2 == 0, low, high), low, high])


@pytest.mark.parametrize("result_dtype", [BF16, F16], ids=name)
@pytest.mark.parametrize("n", [7, 512, 16384])
def test_rounding_is_to_nearest_even(backend, device, result_dtype, n):
    """Filters of zeros, -2 and 2: their statistics are exact in any order of summation, and aligned they are -gain and
    gain, many of which are midway between two results."""
    gain, rounded = (t[:: max(1, n // 512)].to(device) for t in near_midway(result_dtype))
    if result_dtype == F16:  # the largest number, and beyond
        gain = torch.cat([gain, torch.tensor([65519.996, 65520, 1e6], device=device)])
        rounded = torch.cat([rounded, torch.tensor([65504, math.inf, math.inf], dtype=F16, device=device)])
    filters = torch.arange(len(gain), device=device)
    weight, at = torch.zeros(len(gain), n, device=device), 2 + 2 * (filters % (n // 2 - 1))
    weight[filters, at], weight[filters, at + 1] = -2.0, 2.0
    aligned = wa.align(weight, gain, eps=12.0, scale=2.0, dtype=result_dtype)
    assert torch.equal(aligned[filters, at + 1], rounded)
    assert torch.equal(aligned[filters, at], -rounded)


@pytest.mark.parametrize("gain_dtype", [*DTYPES, None], ids=name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_gain_of_any_dtype(backend, device, dtype, gain_dtype):
    gain = gain_dtype and normal(16, mean=1, std=0.3, seed=1, device=device, dtype=gain_dtype)
    check_align(he(16, 8, 3, 3, device=device, dtype=dtype), gain)


def test_strided_gain(backend, device):
    gain = normal(32, seed=1, device=device)[::2]
    check_align(he(16, 8, 3, 3, device=device), gain)
    check_align(he(16, 8, 3, 3, device=device), normal(1, device=device).expand(16))


@pytest.mark.parametrize("gain_dtype", [F32, BF16], ids=name)
def test_gain_of_timm(backend, device, gain_dtype):
    """Gains of shape (K, 1, 1, 1), and gradients of the same."""
    weights = [he(16, 8, 3, 3, device=device).requires_grad_(), he(5, 7, device=device, seed=1).requires_grad_()]
    gains = [normal(*shape, seed=2, device=device, dtype=gain_dtype) for shape in ((16, 1, 1, 1), (5, 1))]
    gains = [gain.requires_grad_() for gain in gains]
    together = wa.align_foreach(weights, gains, eps=[0.1, 2.0], scale=[1.7, 0.4])
    grads = torch.autograd.grad([aligned.sin().sum() for aligned in together], gains)
    for weight, gain, aligned, grad, eps, scale in zip(
        weights, gains, together, grads, (0.1, 2.0), (1.7, 0.4), strict=True
    ):
        flat = gain.detach().flatten().requires_grad_()
        alone = wa.align(weight, flat, eps=eps, scale=scale)
        assert torch.equal(aligned, alone) and grad.shape == gain.shape and grad.dtype == gain_dtype
        assert torch.equal(grad.flatten(), torch.autograd.grad(alone.sin().sum(), flat)[0])


@pytest.mark.parametrize("eps", [1e-12, 1e-3, 0.5, 100])
@pytest.mark.parametrize("scale", [0.3, -2, 36**0.5, 0.0])
@pytest.mark.parametrize("dtype", [F32, F64], ids=name)
def test_eps_and_scale(backend, device, eps, scale, dtype):
    gain = torch.tensor([0.0, -1.0, 2.5], device=device)
    check_align(he(3, 8, 3, 3, device=device, dtype=dtype), gain, eps=eps, scale=scale)


@pytest.mark.parametrize("dtype", [F32, F64], ids=name)
def test_defaults(backend, device, dtype):
    weight = he(8, 72, device=device, dtype=dtype)
    assert torch.equal(wa.align(weight), wa.align(weight, None, eps=1e-5, scale=1.0))
    assert torch.equal(wa.align(weight), wa.align(weight, torch.ones(8, device=device)))


@pytest.mark.parametrize("shape", [s for s in SHAPES.values() if len(s) < 5 and s[-1] > 1], ids=str)
def test_layer_norm_is_an_oracle(backend, device, shape):
    weight, gain = he(*shape, device=device, dtype=F64), normal(shape[0], device=device, dtype=F64)
    grad, n, eps = normal(*shape, seed=2, device=device, dtype=F64), math.prod(shape[1:]), 1e-3
    inputs = weight.requires_grad_(), gain.requires_grad_()
    aligned = wa.align(*inputs, eps=eps)
    other = F.layer_norm(weight, shape[1:], eps=2 * eps / n) * (2 / n) ** 0.5
    other = other * gain.view((-1,) + (1,) * (weight.dim() - 1))
    torch.testing.assert_close(aligned, other, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(result, inputs, grad) for result in (aligned, other)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12 * theirs.abs().max().item())


def test_gain_1_has_mean_0_and_norm_sqrt_2(backend, device):
    aligned = wa.align(normal(64, 147, mean=3, std=20, device=device)).double()  # eps is negligible against n/2 * 400
    assert aligned.mean(1).abs().max() < 1e-8
    assert (aligned.norm(dim=1) - 2**0.5).abs().max() < 1e-6


def test_scale_and_shift_of_a_filter_change_nothing(backend, device):
    weight = he(8, 147, device=device, dtype=F64)
    factor = torch.logspace(-3, 3, 8, device=device, dtype=F64)[:, None]
    moved = wa.align(weight * factor + 5, eps=1e-30)
    torch.testing.assert_close(moved, wa.align(weight, eps=1e-30), rtol=0, atol=1e-10)


def test_gradient_sums_to_0_and_is_orthogonal_up_to_eps(backend, device):
    weight, grad, eps, scale = he(8, 147, device=device, dtype=F64), normal(8, 147, seed=3, dtype=F64), 0.01, 1.7
    gain, grad = normal(8, seed=1, device=device, dtype=F64), grad.to(device)
    _, grad_weight, grad_gain = check_align(weight, gain, grad, eps=eps, scale=scale)
    assert grad_weight.sum(1).abs().max() < 1e-12
    deviations = weight - weight.mean(1, keepdim=True)
    # d w . d = gain * d gain * eps / (n/2 * var + eps): 0 except for eps, since alignment is invariant to scaling w
    left = gain * grad_gain * eps / (147 / 2 * weight.var(1, correction=0) + eps)
    torch.testing.assert_close((grad_weight * deviations).sum(1), left, rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 9, 147, 4608, 8193])
@pytest.mark.parametrize("value", [0.0, 0.1, 1e4, 1e-20, -3.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_constant_filter_gives_exactly_0(backend, device, n, value, dtype):
    weight = he(3, n, device=device, dtype=dtype)
    weight[1] = value
    aligned, grad_weight, grad_gain = check_align(weight, torch.ones(3, device=device))
    assert bool((aligned[1] == 0).all())
    assert bool(grad_weight.isfinite().all() and grad_gain.isfinite().all())


def test_constant_filter_with_the_smallest_eps(backend, device):
    weight = torch.full((2, 147), 3.3, device=device)
    aligned, grad_weight, grad_gain = check_align(weight, torch.ones(2, device=device), eps=2.0**-126)
    assert not aligned.any() and grad_weight.isfinite().all() and grad_gain.isfinite().all()


@pytest.mark.parametrize("n", [9, 576, 4608, 20000])
@pytest.mark.parametrize(("mean", "std"), [(1e4, 1e-3), (-300.0, 1e-4), (1.0, 1e-6), (1e-20, 1e-25)], ids=str)
def test_mean_far_above_the_deviations(backend, device, n, mean, std):
    check_align(normal(8, n, mean=mean, std=std, device=device), torch.ones(8, device=device), eps=1e-12)


@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=name)
def test_large_and_small_weights(backend, device, dtype):
    for std in (1e-12, 1e-6, 1e6, 1e10, 1e17):  # squares of 1e17 just fit float32
        check_align(normal(4, 288, std=std, device=device, dtype=dtype), torch.ones(4, device=device))


@pytest.mark.parametrize("n", [1, 9, 147, 4608, 8193])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["weight", "gain", "grad"])
def test_nan_and_inf_stay_in_their_filter(backend, device, n, bad, where):
    tensors = {
        "weight": he(3, n, device=device),
        "gain": normal(3, seed=1, device=device),
        "grad": normal(3, n, seed=2, device=device),
    }

    def run():
        weight, gain = tensors["weight"].clone().requires_grad_(), tensors["gain"].clone().requires_grad_()
        aligned = wa.align(weight, gain)
        return (aligned, *torch.autograd.grad(aligned, (weight, gain), tensors["grad"]))

    clean = run()
    tensors[where][(1, n // 2)[: tensors[where].dim()]] = bad
    for before, after in zip(clean, run(), strict=True):
        for k in (0, 2):
            assert torch.equal(before[k], after[k])
    if where == "weight":
        assert bool(run()[0][1].isnan().all())


@pytest.mark.parametrize("with_gain", [True, False], ids=["gain", "no gain"])
def test_gradcheck(backend, device, with_gain):
    weight = normal(3, 2, 2, 2, dtype=F64, device=device).requires_grad_()
    gain = normal(3, seed=1, dtype=F64, device=device).requires_grad_() if with_gain else None

    def run(weight, gain):
        return wa.align(weight, gain, eps=0.1, scale=1.3)

    assert torch.autograd.gradcheck(run, (weight, gain))
    assert torch.autograd.gradgradcheck(run, (weight, gain))


def test_hessian(backend, device):
    weight, gain = normal(2, 5, dtype=F64, device=device), normal(2, seed=1, dtype=F64, device=device)

    def hessian(align):
        return torch.autograd.functional.hessian(lambda w, g: align(w, g, eps=0.01).sin().sum(), (weight, gain))

    for ours, theirs in zip(hessian(wa.align), hessian(formula), strict=True):
        for mine, true in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, true, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("result_dtype", [F32, BF16], ids=name)
def test_first_order_gradients_are_the_same_under_create_graph(backend, device, result_dtype):
    weight, gain = he(8, 147, device=device).requires_grad_(), torch.ones(8, device=device, requires_grad=True)
    grad = normal(8, 147, seed=2, device=device).to(result_dtype)
    aligned = wa.align(weight, gain, dtype=result_dtype, scale=1.2)
    once = torch.autograd.grad(aligned, (weight, gain), grad, retain_graph=True)
    twice = torch.autograd.grad(aligned, (weight, gain), grad, create_graph=True)
    for a, b in zip(once, twice, strict=True):
        assert b.requires_grad
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def bits(shape, device):
    weight, gain = he(*shape, device=device).requires_grad_(), normal(shape[0], device=device).requires_grad_()
    aligned = wa.align(weight, gain)
    return (aligned, *torch.autograd.grad(aligned, (weight, gain), normal(*shape, seed=5, device=device)))


@pytest.mark.parametrize("shape", [(64, 4608), (2048, 1, 3, 3), (3, 20000), (1, 300000)], ids=str)
def test_same_bits_every_time(backend, device, shape):
    for first, second in zip(bits(shape, device), bits(shape, device), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("shape", [(64, 4608), (20000, 1, 3, 3), (3, 20000), (1, 300000)], ids=str)
@pytest.mark.usefixtures("restore_threads")
def test_same_bits_on_any_number_of_threads(native, device, shape):
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(bits(shape, device))
    for first, *others in zip(*results, strict=True):
        assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("shape", [(0, 4), (0, 3, 3, 3), (3, 0), (3, 0, 3, 3), (0, 0, 3)], ids=str)
@pytest.mark.parametrize("dtype", [F32, F64], ids=name)
def test_empty_tensors(backend, device, shape, dtype):
    weight = torch.zeros(shape, dtype=dtype, device=device, requires_grad=True)
    gain = torch.ones(shape[0], dtype=BF16, device=device, requires_grad=True)
    aligned = wa.align(weight, gain)
    aligned.sum().backward()
    assert (aligned.shape, aligned.dtype, weight.grad.shape) == (shape, dtype, shape)
    assert torch.equal(gain.grad, torch.zeros_like(gain))
