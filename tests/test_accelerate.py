"""Accelerate prepares a converted model: its mixed precision enters autocast inside the model's forward."""

import accelerate
import pytest
import torch
from test_foreach import CountOps
from torch import nn
from truth import normal

import weightalign_cuda as wa


def network():
    torch.manual_seed(0)
    layers = [wa.WAConv2d(3, 8, 3, eps=0.2, scale=1.3), nn.ReLU(), wa.WAConv2d(8, 8, 3, scale=0.7), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(8 * 16, 5))


@pytest.fixture(autouse=True)
def fresh_state():
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_one_launch_each_way(mixed_precision):
    """And the numbers of layers that align themselves."""
    accelerator, found = accelerate.Accelerator(mixed_precision=mixed_precision, cpu=True), []
    for foreach in (True, False):
        model = wa.convert(network(), foreach=foreach)
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
        for _ in range(3):
            with CountOps() as forward:
                loss = nn.functional.cross_entropy(model(normal(4, 3, 8, 8)).float(), torch.arange(4))
            with CountOps() as backward:
                accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            assert sum(forward.calls.values()) == sum(backward.calls.values()) == (1 if foreach else 2)
        found.append([loss.detach(), *model.parameters()])
    for ours, expected in zip(*found, strict=True):
        assert torch.equal(ours, expected)
