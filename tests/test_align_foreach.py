"""align_foreach: one op call for a list, with the results of align."""

import contextlib

import pytest
import torch
from count_ops import CountOps
from truth import BF16, F16, F32, F64, assert_right, dense, formula, name, normal
from varied import numbers

import weightalign_cuda as wa

# As in a network: many sizes, from depthwise to long filters.
SHAPES = [
    (8, 3, 7, 7),
    (16, 8, 1, 1),
    (16, 1, 3, 3),
    (8, 16, 3, 3),
    (4, 5, 3),
    (10, 64),
    (2, 600, 4, 4),
    (1, 2, 3, 3, 3),
]


def network(count, device, dtype=F32, shapes=SHAPES):
    """Weights, every third in channels_last; gains, every fourth None; eps and scale of each."""
    weights, gains = [], []
    for i in range(count):
        weight = normal(*shapes[i % len(shapes)], seed=i, device=device, dtype=dtype)
        weights.append(weight if i % 3 else dense(weight, (0, *range(2, weight.dim()), 1)))
        gains.append(normal(weight.shape[0], seed=1000 + i, device=device) if i % 4 else None)
    return weights, gains, numbers(count)


def with_grad(tensors):
    return [t if t is None else t.detach().requires_grad_() for t in tensors]


def each_alone(weights, gains, options, **kwargs):
    each = zip(weights, gains, *options.values(), strict=True)
    return [wa.align(w, g, eps=eps, scale=scale, **kwargs) for w, g, eps, scale in each]


def gradients(results, weights, gains):
    """Gradients of the weights, then of the gains that are not None."""
    grads = [normal(*r.shape, seed=5000 + i, device=r.device).to(r.dtype) for i, r in enumerate(results)]
    return torch.autograd.grad(results, [*weights, *(g for g in gains if g is not None)], grads)


@pytest.mark.parametrize("count", [1, 2, 53, 600])
@pytest.mark.parametrize(("dtype", "result_dtype"), [(F32, F32), (F32, BF16), (F16, F16), (F64, F64)], ids=name)
def test_list_equals_single_calls(backend, device, count, dtype, result_dtype):
    weights, gains, options = network(count, device, dtype, SHAPES if count < 600 else SHAPES[1:6])
    weights, gains = with_grad(weights), with_grad(gains)
    together = wa.align_foreach(weights, gains, **options, dtype=result_dtype)
    alone = each_alone(weights, gains, options, dtype=result_dtype)
    assert isinstance(together, list)
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride() and a.dtype == result_dtype
    for a, b in zip(gradients(together, weights, gains), gradients(alone, weights, gains), strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride() and a.dtype == b.dtype


def test_eps_and_scale_for_each_weight(backend, device):
    weights, gains, _ = network(6, device)
    weights, gains = with_grad(weights), with_grad(gains)
    eps, scales = [1e-5, 1.0, 3, 0.1, 20.0, 1e-9], (1, -2.0, 0.5, 0.0, 7.0, 1.0)
    results = wa.align_foreach(tuple(weights), tuple(gains), eps=eps, scale=scales)
    grads = [normal(*r.shape, seed=i, device=device) for i, r in enumerate(results)]
    found = iter(torch.autograd.grad(results, [*weights, *(g for g in gains if g is not None)], grads))
    grad_weights = [next(found) for _ in weights]
    for i, gain in enumerate(gains):
        grad_gain = None if gain is None else next(found)
        assert_right(weights[i], gain, grads[i], results[i], grad_weights[i], grad_gain, eps=eps[i], scale=scales[i])


def test_defaults_and_no_gains(backend, device):
    weights, *_ = network(5, device)
    expected = [wa.align(w) for w in weights]
    for gains in (None, [None] * 5, [torch.ones(w.shape[0], device=device) for w in weights]):
        assert all(torch.equal(*pair) for pair in zip(wa.align_foreach(weights, gains), expected, strict=True))


@pytest.mark.parametrize("empty", [[], ()], ids=str)
def test_no_weights(backend, empty):
    assert wa.align_foreach(empty) == []
    assert wa.align_foreach(empty, empty, eps=empty, scale=[]) == []


def test_empty_weights_among_others(backend, device):
    shapes = [(0, 3), (4, 9), (3, 0), (2, 3, 3), (0, 0)]
    weights = with_grad([normal(*s, seed=i, device=device) for i, s in enumerate(shapes)])
    gains = with_grad([torch.ones(s[0], device=device) for s in shapes])
    options = numbers(len(shapes))
    results = wa.align_foreach(weights, gains, **options)
    for got, alone in zip(results, each_alone(weights, gains, options), strict=True):
        assert torch.equal(got, alone)
    sum(r.square().sum() for r in results).backward()
    assert [w.grad.shape for w in weights] == [w.shape for w in weights]
    assert torch.equal(gains[2].grad, torch.zeros(3, device=device))
    (true,) = torch.autograd.grad(
        formula(weights[1], gains[1], *(v[1] for v in options.values())).square().sum(), gains[1]
    )
    torch.testing.assert_close(gains[1].grad, true)


@pytest.mark.parametrize("result_dtype", [None, BF16], ids=name)
def test_mixed_dtypes_and_layouts_come_back_in_order(backend, device, result_dtype):
    dtypes = [F32, BF16, F16, F32, BF16] + ([F64] if result_dtype is None else [])
    weights, gains, options = network(4 * len(dtypes), device)
    weights = with_grad([weight.to(dtype) for weight, dtype in zip(weights, dtypes * 4, strict=True)])
    gains = with_grad(gains)
    together = wa.align_foreach(weights, gains, **options, dtype=result_dtype)
    alone = each_alone(weights, gains, options, dtype=result_dtype)
    for weight, a, b in zip(weights, together, alone, strict=True):
        assert a.dtype == (result_dtype or weight.dtype)
        assert torch.equal(a, b) and a.stride() == b.stride()
    for a, b in zip(gradients(together, weights, gains), gradients(alone, weights, gains), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("drop", ["weight", "gain", "both", "result"])
def test_frozen_weights_and_unused_results_get_no_gradient(backend, device, drop):
    weights, gains, options = network(8, device)
    weights, gains = with_grad(weights), with_grad(gains)
    plain = gradients(each_alone(weights, gains, options), weights, gains)
    expected = dict(zip([*weights, *(g for g in gains if g is not None)], plain, strict=True))
    dropped = (1, 4, 5)  # 4 has no gain
    for i in dropped:
        if drop in ("weight", "both"):
            weights[i].requires_grad_(False)
        if drop in ("gain", "both") and gains[i] is not None:
            gains[i].requires_grad_(False)
    results = wa.align_foreach(weights, gains, **options)
    used = [i for i in range(8) if not (drop == "result" and i in dropped) and results[i].requires_grad]
    grads = [normal(*r.shape, seed=5000 + i, device=device) for i, r in enumerate(results)]
    torch.autograd.backward([results[i] for i in used], [grads[i] for i in used])
    for i in range(8):
        for kind, leaf in (("weight", weights[i]), ("gain", gains[i])):
            if leaf is None:
                continue
            if i in dropped and drop in (kind, "both", "result"):
                assert leaf.grad is None
            else:
                assert torch.equal(leaf.grad, expected[leaf])


def test_frozen_weights_under_create_graph(backend, device):
    """First and second derivatives of the used results of a list, against autograd of the formula."""
    weights, gains, options = network(6, device, F64)
    weights, gains = with_grad(weights), with_grad([g if g is None else g.double() for g in gains])
    weights[1].requires_grad_(False)
    gains[2].requires_grad_(False)
    leaves = [weights[0], weights[2], gains[1], gains[5], weights[5]]  # 3 is not used, 4 not requested
    together = wa.align_foreach(weights, gains, **options)
    alone = [formula(*each) for each in zip(weights, gains, *options.values(), strict=True)]
    found = []
    for results in (together, alone):
        loss = sum((i + 1) * r.sin().sum() for i, r in enumerate(results) if i != 3)
        once = torch.autograd.grad(loss, leaves, create_graph=True)
        plain = torch.autograd.grad(loss, leaves, retain_graph=True)
        twice = torch.autograd.grad(sum(g.cos().sum() for g in once), leaves)
        found.append([*plain, *once, *twice])
    for ours, true in zip(*found, strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-9, atol=1e-11)


def test_no_gradient_required(backend, device):
    *plain, options = network(4, device)
    leaves = [with_grad(each) for each in plain]
    for context, lists in ((torch.no_grad(), leaves), (contextlib.nullcontext(), plain)):
        with context:
            assert not any(r.requires_grad for r in wa.align_foreach(*lists, **options))
    with torch.inference_mode():
        inside = wa.align_foreach(*leaves, **options)
    assert all(torch.equal(*pair) for pair in zip(inside, each_alone(*leaves, options), strict=True))


@pytest.mark.parametrize("count", [1, 53, 600])
def test_one_op_call_forward_and_one_backward(native, device, count):
    weights, gains, options = network(count, device, shapes=SHAPES[1:6])
    weights, gains = with_grad(weights), with_grad(gains)
    with CountOps() as forward:
        results = wa.align_foreach(weights, gains, **options)
    with CountOps() as backward:
        torch.autograd.backward(results, [torch.ones_like(r) for r in results])
    assert forward.calls == {"align_forward": 1}
    assert backward.calls == {"align_backward": 1}


def test_one_op_call_for_each_dtype(native, device):
    weights = with_grad([normal(4, 9, seed=i, device=device, dtype=d) for i, d in enumerate([F32, BF16, F64] * 3)])
    with CountOps() as ops:
        results = wa.align_foreach(weights)
        torch.autograd.backward(results, [torch.ones_like(r) for r in results])
    assert ops.calls == {"align_forward": 3, "align_backward": 3}
