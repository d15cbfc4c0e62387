"""Accelerate: mixed precision enters autocast inside the model's forward; its hooks, such as those for offloading, set
a forward on each layer, so convert must come first."""

import logging

import accelerate
import pytest
import timm
import torch
from accelerate.hooks import remove_hook_from_submodules
from count_ops import CountOps
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
    """With the results of layers that align themselves."""
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


MODELS = {
    "plain": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)),
    "timm's": lambda: nn.Sequential(timm.layers.StdConv2d(3, 4, 3), timm.layers.ScaledStdConv2dSame(4, 4, 3)),
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_offloaded_models(caplog, make):
    model = accelerate.cpu_offload(make(), execution_device="cpu")
    caplog.set_level(logging.WARNING, logger="weightalign_cuda")
    wa.convert(model)
    (record,) = caplog.records
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    assert record.getMessage() == (
        f"convert changes nothing in this model: {', '.join(names)} (a forward set on the object, as accelerate's "
        "hooks are: convert before)"
    )
    image = normal(1, 3, 7, 7)
    expected = model(image)  # unchanged: nothing was converted in part
    remove_hook_from_submodules(model)
    assert torch.equal(model(image), expected)
    caplog.clear()
    wa.convert(model)
    aligned = model(image)
    assert [isinstance(model.get_submodule(name), wa.WAConv2d) for name in names] == [True, True] and not caplog.records
    accelerate.cpu_offload(model, execution_device="cpu")
    assert all(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(model(image), aligned)
    remove_hook_from_submodules(model)
    torch.testing.assert_close(wa.fold(model)(image), aligned)
