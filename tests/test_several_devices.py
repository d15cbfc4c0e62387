"""Lists and models on two CUDA devices: each launch on its own device, whichever is current."""

import contextlib

import pytest
import torch
from torch import nn
from truth import formula, normal

import weightalign_cuda as wa

FIRST, SECOND = "cuda:0", "cuda:1"
PLACES = (FIRST, "cpu", SECOND)


@pytest.fixture(params=[0, 1])
def current(request):
    """The current device, which calls must leave as it is."""
    with torch.cuda.device(request.param):
        yield
        assert torch.cuda.current_device() == request.param


def leaves():
    weights = [normal(8, 3, 3, 3, seed=i).to(device).requires_grad_() for i, device in enumerate(PLACES)]
    return weights, [normal(8, seed=9 + i).to(device).requires_grad_() for i, device in enumerate(PLACES)]


@pytest.mark.parametrize("forced", [None, "reference"])
def test_list_of_several_devices(current, forced):
    (weights, gains), eps, scales = leaves(), [0.1, 0.2, 0.3], [1.5, 0.7, 2.0]
    with wa.use_backend(forced) if forced else contextlib.nullcontext():
        aligned = wa.align_foreach(weights, gains, eps=eps, scale=scales)
    assert [str(a.device) for a in aligned] == list(PLACES)
    found = torch.autograd.grad(sum(a.sin().sum().cpu() for a in aligned), weights + gains)
    truth = [t.detach().cpu().double().requires_grad_() for t in weights + gains]
    exact = [formula(w, g, eps=e, scale=s) for w, g, e, s in zip(truth[:3], truth[3:], eps, scales, strict=True)]
    expected = torch.autograd.grad(sum(a.sin().sum() for a in exact), truth)
    for each, true in zip((*aligned, *found), (*exact, *expected), strict=True):
        torch.testing.assert_close(each.detach().cpu().double(), true.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("place", [SECOND, "cpu"])
def test_gain_on_another_device(current, place):
    weight, gain = normal(8, 3, 3, 3).to(FIRST), normal(8).to(place)
    with pytest.raises(ValueError, match=f"gain: expected the weight's device {FIRST}, got {place}"):
        wa.align(weight, gain)
    with pytest.raises(ValueError, match=rf"gains\[1\]: expected the weight's device {FIRST}, got {place}"):
        wa.align_foreach([weight, weight], [None, gain])


def test_input_on_another_device(current):
    with pytest.raises(ValueError, match=rf"input.*{FIRST}.*{SECOND}|input.*{SECOND}.*{FIRST}"):
        wa.conv2d(normal(2, 3, 8, 8).to(SECOND), normal(8, 3, 3, 3).to(FIRST))


@pytest.mark.parametrize("place", [SECOND, "cpu"])
def test_ops_refuse_several_devices(ops, current, place):
    """The registered ops themselves, which users may call."""
    first, other = normal(8, 3, 3, 3).to(FIRST), normal(8, 3, 3, 3).to(place)
    options = [0.1], [1.5], torch.float32, torch.preserve_format
    with pytest.raises(RuntimeError, match="device"):
        ops.align_forward([first, other], [None, None], [0.1] * 2, [1.5] * 2, *options[2:])
    with pytest.raises(RuntimeError, match="device"):
        ops.align_forward([first], [normal(8).to(place)], *options)
    aligned, statistics = ops.align_forward([first], [None], *options)
    with pytest.raises(RuntimeError, match=r"statistics|device"):
        ops.align_backward(aligned, [first], [None], statistics.to(place), [1.5])


class Split(nn.Module):
    """The second layer on the second device."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3).to(FIRST), nn.Conv2d(8, 8, 3).to(SECOND)

    def forward(self, image):
        return self.second(self.first(image.to(FIRST)).to(SECOND))


@pytest.mark.parametrize("foreach", [False, True])
def test_model_on_two_devices(current, foreach):
    torch.manual_seed(0)
    model, image = wa.convert(Split(), foreach=foreach), normal(2, 3, 9, 9)
    expected = torch.autograd.grad(model(image).square().sum(), list(model.parameters()))
    with wa.accumulate(model):
        for _ in range(2):
            model(image).square().sum().backward()
    for parameter, grad in zip(model.parameters(), expected, strict=True):
        assert parameter.grad.device == parameter.device
        torch.testing.assert_close(parameter.grad, 2 * grad, rtol=1e-4, atol=1e-5)
    with torch.no_grad(), wa.frozen(model.eval()):
        frozen = model(image)
    torch.testing.assert_close(wa.fold(model)(image), frozen)


def test_data_parallel(current):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    model, image = wa.convert(layers).to(FIRST), normal(4, 3, 9, 9).to(FIRST)
    expected = torch.autograd.grad(model(image).square().sum(), list(model.parameters()))
    found = torch.autograd.grad(nn.DataParallel(model, [0, 1])(image).square().sum(), list(model.parameters()))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
