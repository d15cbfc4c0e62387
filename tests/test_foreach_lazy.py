"""foreach aligns when the first layer asks, in the dtype that it asks for, wherever in the forward that is."""

import pytest
import torch
from foreach_model import assert_same, image, step
from torch import nn
from torch.utils.checkpoint import checkpoint
from truth import BF16

import weightalign_cuda as wa


class Model(nn.Module):
    """Three convolutions with different eps and scales; `run` decides how the block is called."""

    def __init__(self, run=lambda block, x: block(x)):
        super().__init__()
        torch.manual_seed(0)
        layers = [
            wa.WAConv2d(3, 6, 3, eps=0.2, scale=1.4),
            nn.SiLU(),
            wa.WAConv2d(6, 6, 3, padding=1, eps=0.05, scale=0.8),
        ]
        self.block = nn.Sequential(*layers)
        self.last = wa.WAConv2d(6, 4, 1, scale=0.6)
        self.run = run

    def forward(self, x):
        return self.last(self.run(self.block, x)).float().mean((2, 3))


def together_and_alone(run, device):
    """Results of `step` for a model aligned together and for one whose layers align themselves."""
    x = image(device).requires_grad_()
    return [step(wa.convert(Model(run), foreach=foreach).to(device), x=x) for foreach in (True, False)]


class AutocastInside(Model):
    """As Accelerate wraps `model.forward`, and as a Lightning training step calls part of its module."""

    def forward(self, x):
        with torch.autocast(x.device.type, BF16):
            return super().forward(x)


def test_autocast_inside_the_forward(native, device, log):
    results = []
    for foreach in (True, False):
        model = wa.convert(AutocastInside(), foreach=foreach).to(device)
        found, forward, backward = step(model)
        assert all(p.grad.dtype == torch.float32 for p in model.parameters())
        results.append((found, sum(forward.values()), sum(backward.values())))
    assert_same(results[0][0], results[1][0])
    assert [r[1:] for r in results] == [(1, 1), (3, 3)] and not log.records


def test_autocast_that_changes_after_the_first_layer(backend, device, log):
    """Layers that ask for another dtype align themselves, which is logged once."""

    def run(block, x):
        x = block(x)
        with torch.autocast(x.device.type, BF16):
            return block[2](block[2](x)).to(x.dtype)

    model = wa.convert(Model(run), foreach=True).to(device)
    expected = step(wa.convert(Model(run)).to(device))[0]
    for _ in range(2):
        assert_same(step(model)[0], expected)
    (record,) = log.records
    message = record.getMessage()
    assert message.startswith("foreach: 'block.2', and others perhaps, is aligned in a launch of its own: autocast")
    assert "torch.bfloat16 here, and asked for torch.float32 when" in message


@pytest.mark.parametrize("reentrant", [True, False])
def test_first_layer_in_a_checkpoint(backend, device, reentrant):
    """The filters are not part of the recomputation."""

    def run(block, x):
        return checkpoint(block, x, use_reentrant=reentrant)

    together, alone = together_and_alone(run, device)
    assert_same(together[0], alone[0])
    assert_same(together[0], step(wa.convert(Model()).to(device))[0])


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_first_layer_without_gradients(backend, device, context):
    """Filters of the other layers still get gradients."""

    def run(block, x):
        with context():
            x = block[1](block[0](x))
        return block[2](x.clone())

    together, alone = together_and_alone(run, device)
    assert_same(together[0], alone[0])
    assert together[0][-1] is not None


def test_part_outside_inference_mode(device, log):
    """Autograd cannot save filters that were made inside inference mode, even of frozen layers."""

    inside, found = [], []

    def run(block, x):
        x = block[1](block[0](x))
        with torch.inference_mode(False), torch.enable_grad():
            inside.append(x.clone().requires_grad_())
            inside.append(block[2](inside[-1]))
        with torch.inference_mode(False), torch.no_grad():
            assert not block[2].aligned_filters().is_inference()
        return inside[-1].detach()

    for foreach in (True, False):
        model = wa.convert(Model(run).requires_grad_(False), foreach=foreach).to(device)
        with torch.inference_mode():
            output = model(image(device))
        found.append([output.clone(), *torch.autograd.grad(inside[-1].sum(), inside[-2])])
    assert_same(*found)
    assert "outside of the inference mode" in log.text


def test_weight_written_to_in_a_training_forward(backend, device, log):
    """Before its layer runs, as some regularisers do: its layer aligns itself, and all backwards are correct."""

    def run(block, x):
        x = block[1](block[0](x))
        with torch.no_grad():
            block[2].weight.mul_(1.5).add_(0.01 * block[2].weight.square())
        return block[2](x)

    together, alone = together_and_alone(run, device)
    assert_same(together[0], alone[0])
    assert "its weight, gain, eps or scale has changed since" in log.text


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.heads = nn.ModuleList([wa.WAConv2d(3, 4, 3, eps=0.2, scale=1.4), wa.WAConv2d(3, 5, 3, eps=0.05)])

    def forward(self, x):
        return [head(x) for head in self.heads]


def test_two_losses_of_one_forward(native, device):
    """One node makes all filters, but the backward of one loss leaves the other's graph intact."""
    found = []
    for foreach in (True, False):
        model = wa.convert(TwoHeads(), foreach=foreach).to(device)
        for output in model(image(device)):
            output.square().sum().backward()
        found.append([p.grad for p in model.parameters()])
    assert_same(*found)


def test_nothing_is_aligned_if_no_layer_asks(native, device):
    model = wa.convert(Model(), foreach=True).to(device)
    model.forward = lambda x: x * model.last.bias.sum()
    assert step(model)[1:] == ({}, {})
