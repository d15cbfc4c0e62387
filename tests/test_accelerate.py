"""accelerate's hooks, as of offloading, set a forward on each layer: convert says so, and is for before."""

import logging

import accelerate
import pytest
import timm
import torch
from accelerate.hooks import remove_hook_from_submodules
from torch import nn
from truth import normal

import weightalign_cuda as wa

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
    expected = model(image)  # as before: nothing was half done
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
