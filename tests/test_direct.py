"""Calls of the native ops without torch's dispatcher: taken where they change nothing, declined everywhere else."""

import functools
import gc
import sys
import weakref

import pytest
import torch
from count_ops import CountOps
from direct_calls import OTHERS, backward, backward_arguments, is_taken
from torch import nn
from torch.overrides import TorchFunctionMode
from truth import DTYPES, assert_near, assert_right, check_align, normal, true_results

import weightalign_cuda as wa
from weightalign_cuda.ops import direct

NUMBERS = 6, 1  # float32, preserve_format
needs_torch_2_14 = pytest.mark.skipif(
    direct.forward([torch.ones(2, 2)], [None], [1.0], [1.0], *NUMBERS, None) is None,
    reason="before torch 2.14 all is declined",
)
pytestmark = needs_torch_2_14


@pytest.fixture
def taken(monkeypatch):
    """Whether each call of a function was taken."""
    calls = []

    def spied(function, *arguments):
        results = function(*arguments)
        calls.append(results is not None)
        return results

    for name in ("forward", "backward"):
        monkeypatch.setattr(direct, name, functools.partial(spied, getattr(direct, name)))
    return calls


def usual(device):
    return normal(4, 3, 2, 2, device=device), normal(4, mean=1, device=device, seed=1)


WEIGHTS = {
    "contiguous": lambda w: w,
    "parameter": lambda w: nn.Parameter(w),
    "channels_last": lambda w: w.to(memory_format=torch.channels_last),
    "transposed": lambda w: w.transpose(0, 2),
    "sliced": lambda w: w[:, 1:],
    "offset": lambda w: torch.cat([w.flatten(), w.flatten()[:1]])[1:].view(w.shape),
    "expanded": lambda w: w[:, :, :1].expand(-1, -1, 3, -1),
    "float64": lambda w: w.double(),
    "bfloat16": lambda w: w.bfloat16(),
}


@pytest.mark.parametrize("change", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("gain", ["none", "flat", "strided"])
def test_what_is_taken_is_right(change, gain, device, taken):
    weight = change(normal(4, 3, 2, 2, device=device))
    gains = normal(2, weight.shape[0], mean=1, seed=1, device=device)
    gains = {"none": None, "flat": gains[0], "strided": gains.t().contiguous()[:, 0]}
    check_align(weight.detach(), gains[gain])
    # A gain's gradient of another dtype than the sums is left to the op.
    assert taken == [True, gains[gain] is None or weight.dtype is not torch.float64]


@pytest.mark.parametrize("shape", [(0, 3), (4, 0), (0, 0)])
def test_empty(shape, device, taken):
    weight, gain = torch.ones(shape, device=device), torch.ones(shape[0], device=device)
    weight.requires_grad_(), gain.requires_grad_()
    aligned = wa.align(weight, gain)
    grads = torch.autograd.grad(aligned, (weight, gain), torch.ones(shape, device=device))
    assert taken == [True, True]
    assert [t.shape for t in (aligned, *grads)] == [weight.shape, weight.shape, gain.shape]
    assert grads[1].count_nonzero() == 0


def test_gains_shaped_as_timms(device, taken):
    weight, gain = usual(device)
    grad = normal(4, 3, 2, 2, device=device, seed=2)
    flat, timms = (
        torch.autograd.grad(wa.align(weight, g), g, grad)[0]
        for g in (gain.requires_grad_(), gain.detach().view(-1, 1, 1, 1).requires_grad_())
    )
    assert taken == [True] * 4
    assert torch.equal(timms, flat.view(-1, 1, 1, 1))


def test_list(device, taken):
    weights = [normal(4, 3, device=device), normal(2, 5, 3, device=device, seed=1), normal(3, 7, device=device, seed=2)]
    gains = [None, normal(2, 1, 1, device=device, seed=3), normal(3, device=device, seed=4)]
    grads = [normal(*w.shape, device=device, seed=5) for w in weights]
    leaves = [t.requires_grad_() for t in (*weights, *gains[1:])]
    aligned = wa.align_foreach(weights, gains)
    found = torch.autograd.grad(aligned, leaves, grads)
    assert taken == [True, True]
    grad_gains = [None, *found[3:]]
    for weight, gain, grad, *results, grad_gain in zip(weights, gains, grads, aligned, found, grad_gains, strict=False):
        assert gain is None or grad_gain.shape == gain.shape
        flat, grad_flat = (None if t is None else t.flatten() for t in (gain, grad_gain))
        assert_right(weight, flat, grad, *results, grad_flat)


class Subclass(torch.Tensor):
    pass


class Mode(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def fake(t):
    with torch._subclasses.FakeTensorMode() as mode:
        return mode.from_tensor(t)


NOT_AS_THEY_ARE = {
    "negated": torch._neg_view,
    "zeros": lambda t: torch._efficientzerotensor(t.shape, device=t.device),
    "subclass": lambda t: t.as_subclass(Subclass),
    "fake": fake,
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "integers": lambda t: t.int(),
    "not a tensor": lambda t: t.tolist(),
}


@pytest.mark.parametrize("change", NOT_AS_THEY_ARE.values(), ids=NOT_AS_THEY_ARE)
def test_tensors_that_are_declined(change, device, capfd):
    weight, gain = usual(device)
    options = [1e-5], [1.0], *NUMBERS, None
    (aligned,), statistics, _ = direct.forward([weight], [gain], *options)
    assert direct.forward([change(weight)], [gain], *options) is None
    assert direct.forward([weight], [change(gain)], *options) is None
    arguments = backward_arguments([aligned], [weight], [gain], statistics, [1.0])
    assert is_taken(arguments)
    assert not is_taken(arguments, grads=[change(aligned)])
    assert not is_taken(arguments, tensors=[change(weight), gain])
    assert not is_taken(arguments, tensors=[weight, change(gain)])
    assert not is_taken(arguments, statistics=change(statistics))
    assert capfd.readouterr().err == ""  # torch's C API reports its errors there


def test_backwards_that_are_declined(device):
    """A gradient that nobody wants, or that is not there; a weight or gain that was written to."""
    weights, gain = [normal(4, 3, 2, 2, device=device, seed=i) for i in range(2)], usual(device)[1]
    grads, statistics, versions = direct.forward(weights, [gain, None], [0.1, 0.2], [1.0, 2.0], *NUMBERS, None)
    assert versions is None  # as nothing requires a gradient
    arguments = backward_arguments(grads, weights, [gain, None], statistics, [1.0, 2.0])
    unused, both = [False] * OTHERS, [True, True]
    assert is_taken(arguments) and is_taken(arguments, wanted=[*unused, False, True, True, False])
    assert not is_taken(arguments, wanted=[*unused, False, True, False, False])
    assert not is_taken(arguments, wanted=[*unused, True, False, True, False])
    assert not is_taken(arguments, wanted=[*both, *both])
    assert not is_taken(arguments, grads=[grads[0], None])
    assert not is_taken(arguments, grads=[grads[0], *grads])  # with that of an input
    assert direct.backward(*arguments) is None  # of which a graph is wanted
    for written in *weights, gain:
        assert is_taken(arguments)
        with torch.no_grad():
            written.zero_()
        assert not is_taken(arguments)
        arguments = backward_arguments(grads, weights, [gain, None], statistics, [1.0, 2.0])


def test_versions(device):
    weights, gains = zip(*(usual(device) for _ in range(2)), strict=True)
    weights[1].zero_(), gains[0].zero_().zero_()
    for needing in *weights, *gains:
        needing.requires_grad_()
        arguments = weights, gains, [0.1, 0.2], [1.0, 2.0], None, 1, None
        assert direct.forward(*arguments)[2] == (0, 1, 2, 0)
        assert direct.forward(weights, (gains[0], None), *arguments[2:])[2] == (
            None if needing is gains[1] else (0, 1, 2, None)
        )
        with torch.no_grad():
            assert direct.forward(*arguments)[2] is None
        needing.requires_grad_(False)


@pytest.mark.parametrize("own", DTYPES)
def test_dtype_of_the_weights(own, device):
    weight = usual(device)[0].to(own)
    (aligned,), *_ = direct.forward([weight], [None], [0.1], [2.0], None, 1, None)
    assert aligned.dtype == own
    assert torch.equal(aligned, check_align(weight, eps=0.1, scale=2.0)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_under_autocast(dtype, device, taken):
    weight, gain = usual(device)
    with torch.autocast(device, dtype):
        results = (
            wa.align(weight, gain),
            *wa.align_foreach([weight], [gain]),
            wa.align(weight, gain, dtype=torch.float32),
        )
        double = wa.align(weight.double(), gain)
    with torch.autocast("cpu" if device == "cuda" else "cuda", torch.bfloat16, enabled=device == "cuda"):
        results += (wa.align(weight, gain),)
    assert [t.dtype for t in results] == [dtype, dtype, torch.float32, torch.float32] and double.dtype == torch.float64
    for result in results:
        assert torch.equal(result, check_align(weight, gain, dtype=result.dtype)[0])
    assert taken[:5] == [True] * 5


def test_negated_tensors_are_read_with_their_sign(device):
    """(Which torch itself sees to for all ops, but not in lists of optional tensors.)"""
    weight, gain = usual(device)
    grad = normal(4, 3, 2, 2, device=device, seed=2)
    negated = [torch._neg_view(t).requires_grad_() for t in (weight, gain)]
    for given in negated, [negated[0], (-gain).requires_grad_()], [(-weight).requires_grad_(), negated[1]]:
        aligned = wa.align(*given)
        results = aligned, *torch.autograd.grad(aligned, given, torch._neg_view(grad))
        for result, truth in zip(results, true_results(-weight, -gain, -grad), strict=True):
            assert_near("result", result, truth, 1e-5)


def test_gains_that_are_zeros_without_memory(device):
    weight, gain = usual(device)
    zeros = torch._efficientzerotensor(gain.shape, device=device)
    assert torch.equal(wa.align(weight, zeros), torch.zeros_like(weight))


TWICE = {"gains": None, "eps": 1.0, "scales": 1.0}


@pytest.mark.parametrize(
    "arguments",
    [
        {"weights": []},
        {"weights": None},
        {"gains": []},
        {"gains": [torch.ones(3)]},
        {"weights": [torch.ones(4)]},
        {"weights": [torch.ones(4, 3), torch.ones(4, 3).double()]} | {k: [v] * 2 for k, v in TWICE.items()},
        *({"eps": [eps]} for eps in (0.0, -1.0, float("inf"), float("nan"), True, 1, "1", None)),
        *({"scales": [scale]} for scale in (float("inf"), float("nan"), True, "1", None)),
        {"eps": [1.0, 1.0]},
        {"dtype": -1},
        {"dtype": "6"},
        {"dtype": 7},
        {"memory_format": None},
    ],
)  # fmt: skip
def test_arguments_that_are_declined(arguments):
    """With no error left for whatever Python does next."""
    given = {"weights": [torch.ones(4, 3)], "gains": [None], "eps": [1e-5], "scales": [1.0], "dtype": 6}
    given |= {"memory_format": 1, "memory": None} | arguments
    assert direct.forward(*given.values()) is None
    assert direct.forward(*list(given.values())[:-1]) is None
    assert len(given) == 7


def test_modes_transforms_tracers_and_profilers_close_it(device):
    weight, _ = usual(device)
    assert direct.is_open()
    closed = {}

    def ask(w):
        closed[len(closed)] = direct.is_open()
        return w * 2

    with CountOps():
        ask(weight)
    with Mode():
        ask(weight)
    with torch.profiler.profile():
        ask(weight)
    torch.func.vmap(ask)(weight)
    torch.func.grad(lambda w: ask(w).sum())(weight)
    torch.func.jvp(ask, (weight,), (weight,))
    with torch.autograd.forward_ad.dual_level():
        ask(weight)
    torch.jit.trace(ask, weight, check_trace=False)
    torch.fx.experimental.proxy_tensor.make_fx(ask)(weight)
    assert list(closed.values()) == [False] * 9
    assert direct.is_open()


def test_profilers_see_the_op(device):
    weight = nn.Parameter(usual(device)[0])
    with torch.profiler.profile() as profile:
        wa.align(weight).sum().backward()
    names = {event.name for event in profile.events()}
    assert names >= {"weightalign_cuda::align_forward", "weightalign_cuda::align_backward"}


def test_batched_gradients_are_declined(device, taken):
    weight = nn.Parameter(usual(device)[0])
    grads = torch.stack([torch.ones_like(weight), torch.full_like(weight, 2)])
    (batch,) = torch.autograd.grad(wa.align(weight), weight, grads.detach(), is_grads_batched=True)
    assert taken[0] and True not in taken[1:]
    each = [torch.autograd.grad(wa.align(weight), weight, grad)[0] for grad in grads.detach()]
    torch.testing.assert_close(batch, torch.stack(each))


def test_reference_counts(device):
    weight, gain = usual(device)
    number, objects = 0.123, [weight, gain, None]
    lists = [weight], [gain], [number], [number]

    def calls():
        for _ in range(100):
            (aligned,), statistics, _ = direct.forward(*lists, *NUMBERS, None)
            backward((aligned,), (weight,), (gain,), statistics, [number])
            direct.forward([weight], [None], [0.0], [1.0], *NUMBERS, None)
        return [weakref.ref(aligned), weakref.ref(statistics)]

    def most_added():
        gc.collect()
        before = [sys.getrefcount(each) for each in (*objects, *lists, number)]
        calls()
        gc.collect()
        after = [sys.getrefcount(each) for each in (*objects, *lists, number)]
        return max(abs(a - b) for a, b in zip(after, before, strict=True))

    references = calls()
    # References to None come and go with other objects of the process, but a leak is there each time.
    assert min(most_added() for _ in range(5)) < 50
    assert [reference() for reference in references] == [None, None]
