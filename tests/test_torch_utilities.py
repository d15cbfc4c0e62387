"""torch's utilities for layers and models work for ours: copies, files, averages, pruning, parametrizations."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parameters_to_vector, parametrizations, parametrize, prune, vector_to_parameters
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from truth import BF16, F64, formula, normal

import weightalign_cuda as wa


def network(activation="relu"):
    torch.manual_seed(0)
    return wa.convert(
        nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1),
            nn.ReLU(),
            wa.WAConv2d(6, 6, 3, stride=2, padding="same_tf", activation=activation),
            nn.ConvTranspose2d(6, 4, 2, groups=2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4, 3),
        )
    )


def step(model, image):
    """One step of SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    F.cross_entropy(model(image), torch.arange(len(image), device=image.device) % 3).backward()
    optimizer.step()


def saved_and_loaded(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def from_state(model):
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other = network()
    other.load_state_dict(torch.load(buffer, weights_only=True))
    return other


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved_and_loaded, from_state]
)
def test_copies(copied):
    """After a step and inside wa.frozen, copies compute the same and are independent."""
    model, image = network(), normal(4, 3, 9, 8)
    step(model, image)
    model.eval()
    with torch.no_grad(), wa.frozen(model):
        expected = model(image)
        other = copied(model)
        assert torch.equal(other(image), expected)
        assert not {id(p) for p in model.parameters()} & {id(p) for p in other.parameters()}
        for gain in wa.gain_parameters(other):
            gain.mul_(2)
        assert torch.equal(model(image), expected) and not torch.equal(other(image), expected)


def test_averaged_model():
    model, image = network(), normal(4, 3, 9, 8)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    expected = {}
    for i in range(3):
        step(model, image)
        average.update_parameters(model)
        # The first update copies.
        expected = {k: (v if i == 0 else (expected[k] + v) / 2).detach().clone() for k, v in model.named_parameters()}
    for name, parameter in average.module.named_parameters():
        torch.testing.assert_close(parameter, expected[name])
    assert len(wa.gain_parameters(average)) == 3
    torch.testing.assert_close(average(image), torch.func.functional_call(model, expected, image))


def test_parameters_to_vector():
    model, image = network(), normal(4, 3, 9, 8)
    vector = parameters_to_vector(model.parameters())
    assert len(vector) == sum(p.numel() for p in model.parameters())
    step(model, image)
    other = network()
    vector_to_parameters(parameters_to_vector(model.parameters()), other.parameters())
    assert torch.equal(other(image), model(image)) and not torch.equal(network()(image), model(image))


@pytest.mark.parametrize("dtype", [torch.float16, BF16, F64])
def test_dtypes(device, dtype):
    model = network().to(device)
    image = normal(4, 3, 9, 8, device=device)
    expected = model(image)
    model.to(dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    output = model(image.to(dtype))
    assert output.dtype == dtype
    rtol = 4 * torch.finfo(dtype).eps if dtype != F64 else 1e-5
    torch.testing.assert_close(output.float(), expected, rtol=rtol, atol=10 * rtol)
    output.sum().backward()


def test_channels_last(device):
    model = network(None).to(device, memory_format=torch.channels_last)
    image = normal(4, 3, 9, 8, device=device)
    torch.testing.assert_close(model(image), network(None).to(device)(image), rtol=1e-5, atol=1e-5)
    assert model[2].aligned_filters().is_contiguous(memory_format=torch.channels_last)
    assert model[:3](image).is_contiguous(memory_format=torch.channels_last)
    step(model, image)


def test_pruned_weights_are_aligned(device):
    """The mask applies to the weight before alignment; fold first to prune what the convolution sees."""
    layer = wa.WAConv2d(3, 4, 3, dtype=F64, device=device)
    prune.l1_unstructured(layer, "weight", 0.5)
    prune.l1_unstructured(layer, "bias", 1)
    image = normal(2, 3, 6, 6, dtype=F64, device=device)
    expected = F.conv2d(image, formula(layer.weight_orig * layer.weight_mask), layer.bias)
    with wa.frozen(layer.eval()):
        torch.testing.assert_close(layer(image), expected, rtol=1e-12, atol=1e-12)
    layer.train()(image).sum().backward()
    assert layer.weight_orig.grad[layer.weight_mask == 0].abs().max() == 0
    prune.remove(layer, "weight")
    torch.testing.assert_close(wa.fold(layer, inplace=True)(image), expected, rtol=1e-12, atol=1e-12)


class Positive(nn.Module):
    def forward(self, x):
        return x.exp()


def test_parametrized_weights_and_gains(device):
    layer = wa.WAConv2d(3, 4, 3, dtype=F64, device=device)
    parametrizations.weight_norm(layer)
    parametrize.register_parametrization(layer, "gain", Positive())
    image = normal(2, 3, 6, 6, dtype=F64, device=device)
    torch.testing.assert_close(layer.gain, torch.full_like(layer.gain, torch.e))
    expected = F.conv2d(image, formula(layer.weight, layer.gain), layer.bias)
    torch.testing.assert_close(layer(image), expected, rtol=1e-12, atol=1e-12)
    with torch.no_grad(), wa.frozen(layer.eval()):
        layer(image)
        layer.parametrizations.gain.original.mul_(2)  # recomputed at each use, so aligned again
        expected = F.conv2d(image, formula(layer.weight, layer.gain), layer.bias)
        torch.testing.assert_close(layer(image), expected, rtol=1e-12, atol=1e-12)
    state = layer.state_dict()
    layer.load_state_dict(state)
    assert "gain" not in state and "parametrizations.gain.original" in state
