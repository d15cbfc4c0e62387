"""align_foreach: one op call for a list, each result what align gives."""

import collections
import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from truth import BF16, F16, F32, F64, assert_right, dense, name, normal

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


class CountOps(TorchDispatchMode):
    """Counts the calls of the registered ops that reach a kernel, native or Triton's, by the native ones' names."""

    def __init__(self):
        super().__init__()
        self.calls = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "weightalign_cuda":
            self.calls[func._opname.removeprefix("triton_")] += 1
        return func(*args, **(kwargs or {}))


def network(count, device, dtype=F32, shapes=SHAPES):
    """Weights, every third in channels_last, and gains, every fourth None."""
    weights, gains = [], []
    for i in range(count):
        weight = normal(*shapes[i % len(shapes)], seed=i, device=device, dtype=dtype)
        weights.append(weight if i % 3 else dense(weight, (0, *range(2, weight.dim()), 1)))
        gains.append(normal(weight.shape[0], seed=1000 + i, device=device) if i % 4 else None)
    return weights, gains


def with_grad(tensors):
    return [t if t is None else t.detach().requires_grad_() for t in tensors]


def gradients(results, weights, gains):
    """Of weights, then of the gains that are not None."""
    grads = [normal(*r.shape, seed=5000 + i, device=r.device).to(r.dtype) for i, r in enumerate(results)]
    return torch.autograd.grad(results, [*weights, *(g for g in gains if g is not None)], grads)


@pytest.mark.parametrize("count", [1, 2, 53, 600])
@pytest.mark.parametrize(("dtype", "result_dtype"), [(F32, F32), (F32, BF16), (F16, F16), (F64, F64)], ids=name)
def test_list_equals_each_alone(backend, device, count, dtype, result_dtype):
    weights, gains = network(count, device, dtype, SHAPES if count < 600 else SHAPES[1:6])
    eps, scales = [1e-5 * (1 + i % 3) for i in range(count)], [1 + 0.5 * (i % 2) for i in range(count)]
    weights, gains = with_grad(weights), with_grad(gains)
    together = wa.align_foreach(weights, gains, eps=eps, scale=scales, dtype=result_dtype)
    each = zip(weights, gains, eps, scales, strict=True)
    alone = [wa.align(w, g, eps=e, scale=s, dtype=result_dtype) for w, g, e, s in each]
    assert isinstance(together, list)
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride() and a.dtype == result_dtype
    for a, b in zip(gradients(together, weights, gains), gradients(alone, weights, gains), strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride() and a.dtype == b.dtype


def test_eps_and_scale_for_each_weight(backend, device):
    weights, gains = network(6, device)
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
    weights, _ = network(5, device)
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
    results = wa.align_foreach(weights, gains)
    for got, weight, gain in zip(results, weights, gains, strict=True):
        assert torch.equal(got, wa.align(weight, gain))
    sum(r.square().sum() for r in results).backward()
    assert [w.grad.shape for w in weights] == [w.shape for w in weights]
    assert torch.equal(gains[2].grad, torch.zeros(3, device=device))
    assert gains[1].grad.abs().min() > 1  # d sum(aligned^2) / d gain = 2 gain |x|^2 = 4


@pytest.mark.parametrize("result_dtype", [None, BF16], ids=name)
def test_mixed_dtypes_and_layouts_come_back_in_order(backend, device, result_dtype):
    dtypes = [F32, BF16, F16, F32, BF16] + ([F64] if result_dtype is None else [])
    weights, gains = [], []
    for i, dtype in enumerate(dtypes * 4):
        pair = network(i + 1, device, dtype)
        weights.append(pair[0][-1])
        gains.append(pair[1][-1])
    weights, gains = with_grad(weights), with_grad(gains)
    together = wa.align_foreach(weights, gains, dtype=result_dtype)
    alone = [wa.align(w, g, dtype=result_dtype) for w, g in zip(weights, gains, strict=True)]
    for weight, a, b in zip(weights, together, alone, strict=True):
        assert a.dtype == (result_dtype or weight.dtype)
        assert torch.equal(a, b) and a.stride() == b.stride()
    for a, b in zip(gradients(together, weights, gains), gradients(alone, weights, gains), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("drop", ["weight", "gain", "both", "result"])
def test_frozen_weights_and_unused_results_get_no_gradient(backend, device, drop):
    weights, gains = (with_grad(each) for each in network(8, device))
    plain = gradients(wa.align_foreach(weights, gains), weights, gains)
    expected = dict(zip([*weights, *(g for g in gains if g is not None)], plain, strict=True))
    dropped = (1, 4, 5)  # 4 has no gain
    for i in dropped:
        if drop in ("weight", "both"):
            weights[i].requires_grad_(False)
        if drop in ("gain", "both") and gains[i] is not None:
            gains[i].requires_grad_(False)
    results = wa.align_foreach(weights, gains)
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
    weights = [normal(3, 9, seed=i, device=device, dtype=F64) for i in range(4)]
    for i in (1, 2):
        weights[i].requires_grad_()
    gains = [None, None, None, torch.ones(3, device=device, dtype=F64).requires_grad_()]
    leaves, results = (weights[1], gains[3]), wa.align_foreach(weights, gains)
    found = [
        torch.autograd.grad(sum(r.sin().sum() for r in results), leaves, create_graph=create_graph, retain_graph=True)
        for create_graph in (False, True)
    ]
    for once, twice in zip(*found, strict=True):
        torch.testing.assert_close(once, twice, rtol=1e-12, atol=1e-12)
        assert torch.autograd.grad(twice.sum(), leaves, retain_graph=True, allow_unused=True)


def test_no_gradient_wanted(backend, device):
    weights, gains = (with_grad(each) for each in network(4, device))
    for context, leaves in ((torch.no_grad(), (weights, gains)), (contextlib.nullcontext(), network(4, device))):
        with context:
            assert not any(r.requires_grad for r in wa.align_foreach(*leaves))
    with torch.inference_mode():
        inside = wa.align_foreach(weights, gains)
    assert all(torch.equal(*pair) for pair in zip(inside, wa.align_foreach(weights, gains), strict=True))


@pytest.mark.parametrize("count", [1, 53, 600])
def test_one_op_call_forward_and_one_backward(native, device, count):
    weights, gains = (with_grad(each) for each in network(count, device, shapes=SHAPES[1:6]))
    with CountOps() as forward:
        results = wa.align_foreach(weights, gains)
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
