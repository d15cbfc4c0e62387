"""timm's weight-standardised convolutions equal ours up to a constant scale and their own eps: an independent check."""

import pytest
import torch
from timm.layers import ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d
from truth import F64, normal

import weightalign_cuda as wa

CONVOLUTIONS = {  # in_channels, out_channels, kernel_size, groups; n of a filter
    "plain": ((8, 6, 3, 1), 72),
    "pointwise": ((16, 4, 1, 1), 16),
    "stem": ((3, 8, 7, 1), 147),
    "groups": ((8, 6, 3, 2), 36),
    "depthwise": ((6, 6, 3, 6), 9),
    "two filters a channel": ((4, 8, 3, 4), 9),
}


def gradients(conv, output, leaves):
    return torch.autograd.grad(output, leaves, normal(*output.shape, seed=9, dtype=F64, device=output.device))


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() <= 1e-12 * b.abs().max()


@pytest.fixture(params=CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def case(request):
    (channels_in, channels_out, size, groups), n = request.param
    arguments = {"kernel_size": size, "padding": size // 2, "groups": groups, "bias": False}
    return (channels_in, channels_out), arguments, n


@pytest.mark.parametrize("eps", [1e-5, 1e-2])
def test_scaled_std_conv(backend, device, case, eps):
    channels, arguments, n = case
    theirs = ScaledStdConv2d(*channels, gamma=2**0.5, eps=2 * eps / n, **arguments).double().to(device)
    ours = wa.WAConv2d(*channels, eps=eps, **arguments).double().to(device)
    with torch.no_grad():
        ours.weight.copy_(theirs.weight)
        ours.gain.copy_(normal(channels[1], seed=2, dtype=F64))
        theirs.gain.copy_(ours.gain.view(-1, 1, 1, 1))
    image = normal(2, channels[0], 9, 8, seed=1, dtype=F64, device=device).requires_grad_()
    outputs = ours(image), theirs(image)
    assert_same(outputs[:1], outputs[1:])
    *first, grad_gain = gradients(ours, outputs[0], (image, ours.weight, ours.gain))
    second = gradients(theirs, outputs[1], (image, theirs.weight, theirs.gain))
    assert_same((*first, grad_gain.view(-1, 1, 1, 1)), second)


@pytest.mark.parametrize(("gamma", "eps"), [(1.0, 1e-6), (1.7139, 1e-5)])
def test_scaled_std_conv_with_any_gamma(backend, device, case, gamma, eps):
    """As in NFNets: gamma belongs to their activation; our scale is gamma / sqrt(2)."""
    channels, arguments, n = case
    theirs = ScaledStdConv2d(*channels, gamma=gamma, eps=eps, **arguments).double().to(device)
    ours = wa.WAConv2d(*channels, eps=n / 2 * eps, scale=gamma / 2**0.5, **arguments).double().to(device)
    ours.load_state_dict({k: v.view(-1) if k == "gain" else v for k, v in theirs.state_dict().items()})
    image = normal(2, channels[0], 9, 8, seed=1, dtype=F64, device=device)
    outputs = ours(image), theirs(image)
    assert_same(outputs[:1], outputs[1:])
    assert_same(gradients(ours, outputs[0], (ours.weight,)), gradients(theirs, outputs[1], (theirs.weight,)))


@pytest.mark.parametrize("eps", [1e-8, 1e-6, 1e-3])
def test_std_conv(backend, device, case, eps):
    channels, arguments, n = case
    theirs = StdConv2d(*channels, eps=eps, **arguments).double().to(device)
    ours = wa.WAConv2d(*channels, eps=n / 2 * eps, scale=(n / 2) ** 0.5, **arguments).double().to(device)
    with torch.no_grad():
        ours.weight.copy_(theirs.weight)
    image = normal(2, channels[0], 9, 8, seed=1, dtype=F64, device=device)
    outputs = ours(image), theirs(image)
    assert_same(outputs[:1], outputs[1:])
    assert_same(gradients(ours, outputs[0], (ours.weight,)), gradients(theirs, outputs[1], (theirs.weight,)))


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("size", [(9, 8), (10, 7)])
def test_same_padding(backend, device, stride, size):
    """TensorFlow's padding, as timm pads the input in its NFNets and BiTs."""
    theirs = ScaledStdConv2dSame(4, 6, 3, stride=stride, gamma=2**0.5, eps=2e-5 / 36).double().to(device)
    x = normal(2, 4, *size, dtype=F64, device=device).requires_grad_()
    weight, gain, bias = theirs.weight, theirs.gain, theirs.bias
    ours = wa.conv2d(x, weight, bias, stride, "same_tf", gain=gain.flatten())
    expected = theirs(x)
    assert_same([ours], [expected])
    leaves = [x, weight, gain, bias]
    assert_same(gradients(theirs, ours, leaves), gradients(theirs, expected, leaves))
