"""WAConv2d: torch's convolution on the aligned weight, a layer like those of torch.nn."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from truth import BF16, F64, formula, normal

import weightalign_cuda as wa

ARGUMENTS = {
    "plain": (6, 8, 3),
    "stride": {"in_channels": 6, "out_channels": 8, "kernel_size": 3, "stride": 2},
    "padding": (6, 8, (3, 5), (1, 2), (1, 2)),
    "same": {"in_channels": 6, "out_channels": 8, "kernel_size": 3, "padding": "same"},
    "dilation": {"in_channels": 6, "out_channels": 8, "kernel_size": 3, "dilation": 2, "padding": 1},
    "groups": {"in_channels": 6, "out_channels": 8, "kernel_size": 3, "groups": 2},
    "depthwise": {"in_channels": 6, "out_channels": 6, "kernel_size": 3, "groups": 6},
    "no bias": {"in_channels": 6, "out_channels": 8, "kernel_size": 1, "bias": False},
    "reflect": {"in_channels": 6, "out_channels": 8, "kernel_size": 3, "padding": 2, "padding_mode": "reflect"},
    "circular": {"in_channels": 6, "out_channels": 8, "kernel_size": 3, "padding": 1, "padding_mode": "circular"},
}


def make(cls, arguments, **kwargs):
    return cls(**arguments, **kwargs) if isinstance(arguments, dict) else cls(*arguments, **kwargs)


@pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=ARGUMENTS)
@pytest.mark.parametrize("eps", [1e-5, 0.3])
def test_output_and_gradients_are_those_of_the_aligned_weight(backend, device, arguments, eps):
    conv = make(wa.WAConv2d, arguments, eps=eps, scale=1.5, device=device, dtype=F64)
    plain = make(nn.Conv2d, arguments, device=device, dtype=F64)
    image = normal(2, 6, 11, 10, seed=1, dtype=F64, device=device).requires_grad_()
    with torch.no_grad():
        conv.gain.copy_(normal(conv.out_channels, seed=2))
    leaves = dict(conv.named_parameters())
    aligned = formula(leaves["weight"], leaves["gain"], eps, 1.5)
    true = torch.func.functional_call(plain, {"weight": aligned} | {k: leaves[k] for k in leaves if k == "bias"}, image)
    output = conv(image)
    torch.testing.assert_close(output, true, rtol=1e-11, atol=1e-11)
    wrt = [image, *leaves.values()]
    for ours, theirs in zip(*(torch.autograd.grad(y.sin().sum(), wrt) for y in (output, true)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_float32_output(backend, device):
    conv = wa.WAConv2d(6, 8, 3, padding=1).to(device)
    image = normal(2, 6, 9, 9, device=device)
    expected = F.conv2d(image.double(), formula(conv.weight.double()), conv.bias.double(), padding=1)
    torch.testing.assert_close(conv(image).double(), expected, rtol=1e-4, atol=1e-4)


def test_autocast(backend, device):
    conv = wa.WAConv2d(6, 8, 3).to(device)
    image = normal(2, 6, 9, 9, device=device)
    with torch.autocast(device, dtype=BF16):
        output = conv(image)
    assert output.dtype == BF16
    torch.testing.assert_close(output.float(), conv(image), rtol=0.05, atol=0.05)
    output.float().sum().backward()
    assert {p.grad.dtype for p in conv.parameters()} == {torch.float32}


def test_channels_last_is_kept(native, device):
    conv = wa.WAConv2d(6, 8, 3).to(device, memory_format=torch.channels_last)
    output = conv(normal(2, 6, 9, 9, device=device))
    output.sum().backward()
    assert output.is_contiguous(memory_format=torch.channels_last)
    assert conv.weight.grad.stride() == conv.weight.stride()


def test_parameters():
    torch.manual_seed(0)
    conv = wa.WAConv2d(6, 8, 3, groups=2)
    torch.manual_seed(0)
    plain = nn.Conv2d(6, 8, 3, groups=2)
    assert {k: tuple(v.shape) for k, v in conv.state_dict().items()} == {
        "weight": (8, 3, 3, 3),
        "bias": (8,),
        "gain": (8,),
    }
    assert list(wa.WAConv2d(6, 8, 3, bias=False).state_dict()) == ["weight", "gain"]
    assert torch.equal(conv.weight, plain.weight) and torch.equal(conv.bias, plain.bias)
    assert torch.equal(conv.gain, torch.ones(8)) and conv.gain.requires_grad
    assert isinstance(conv, nn.Conv2d) and (conv.eps, conv.scale) == (1e-5, 1.0)
    half = wa.WAConv2d(6, 8, 3, dtype=BF16, device="meta")
    assert {(p.dtype, p.device.type) for p in half.parameters()} == {(BF16, "meta")}


def test_reset_parameters():
    conv = wa.WAConv2d(6, 8, 3)
    before = copy.deepcopy(conv.state_dict())
    with torch.no_grad():
        conv.gain.fill_(3)
    conv.reset_parameters()
    assert torch.equal(conv.gain, torch.ones(8))
    assert not torch.equal(conv.weight, before["weight"])


def test_repr():
    assert repr(wa.WAConv2d(6, 8, 3)) == "WAConv2d(6, 8, kernel_size=(3, 3), stride=(1, 1), eps=1e-05)"
    assert repr(wa.WAConv2d(6, 8, 3, eps=0.5, scale=2, bias=False)).endswith("bias=False, eps=0.5, scale=2)")


def test_deepcopy_pickle_and_state_dict(device):
    conv = wa.WAConv2d(6, 8, 3, eps=1e-3, scale=1.25).to(device)
    with torch.no_grad():
        conv.gain.copy_(normal(8))
    image = normal(2, 6, 9, 9, device=device)
    conv(image).sum().backward()  # a copy must work after a step as well
    loaded = wa.WAConv2d(6, 8, 3, eps=1e-3, scale=1.25).to(device)
    loaded.load_state_dict(conv.state_dict())
    buffer = io.BytesIO()
    torch.save(conv, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=False)
    for other in (copy.deepcopy(conv), pickle.loads(pickle.dumps(conv)), loaded, saved):
        assert torch.equal(other(image), conv(image))
        assert other.weight is not conv.weight and other.gain is not conv.gain
        assert repr(other) == repr(conv)


def test_scale_of_the_weight_changes_nothing(backend, device):
    conv = wa.WAConv2d(6, 8, 3, dtype=F64, device=device, eps=1e-30)
    image = normal(2, 6, 9, 9, dtype=F64, device=device)
    before = conv(image)
    with torch.no_grad():
        conv.weight.mul_(37).add_(2)
    torch.testing.assert_close(conv(image), before, rtol=1e-10, atol=1e-10)


def test_training_reduces_the_loss(backend, device):
    torch.manual_seed(0)
    model = nn.Sequential(wa.WAConv2d(3, 8, 3), nn.ReLU(), wa.WAConv2d(8, 4, 3, stride=2)).to(device)
    image, target = normal(4, 3, 9, 9, device=device), normal(4, 4, 3, 3, seed=1, device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    losses = []
    for _ in range(20):
        loss = F.mse_loss(model(image), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(p.grad.abs().max() > 0 for p in model.parameters())
