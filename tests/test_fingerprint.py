"""The fingerprint of a layer: the native function's and Python's change in the same cases."""

import pytest
import torch
from test_direct import needs_torch_2_14
from torch import nn

import weightalign_cuda as wa
from weightalign_cuda.model.fingerprint import fingerprint, fingerprint_in_python
from weightalign_cuda.ops import direct


def layer_of(device, gain):
    layer = wa.WAConv2d(4, 4, 2, device=device)
    if not gain:
        layer.register_parameter("gain", None)
    return layer


def swap(layer, name):
    setattr(layer, name, nn.Parameter(getattr(layer, name).detach()))


def set_data(change):
    def apply(layer, name):
        t = getattr(layer, name)
        t.data = change(t.data)

    return apply


# Of the weight or of the gain.
CHANGES = {
    "written": lambda layer, name: getattr(layer, name).detach().add_(1),
    "another": swap,
    "another without gradients": lambda layer, name: getattr(layer, name).requires_grad_(False),
    "another memory": set_data(torch.clone),
    "another dtype": set_data(torch.Tensor.bfloat16),
    "other strides": set_data(lambda t: t.as_strided(t.shape, (0,) * t.dim())),
}


@needs_torch_2_14
@pytest.mark.parametrize("name", ["weight", "gain"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changes_of_tensors(change, name, device):
    layer = layer_of(device, gain=True)
    native, python = direct.fingerprint(layer), fingerprint_in_python(layer)
    assert native == direct.fingerprint(layer) and python == fingerprint_in_python(layer)
    change(layer, name)
    assert None is not direct.fingerprint(layer) != native
    assert fingerprint_in_python(layer) != python


@needs_torch_2_14
@pytest.mark.parametrize("gain", [True, False])
@pytest.mark.parametrize("name", ["eps", "scale"])
def test_changes_of_numbers(gain, name, device):
    layer = layer_of(device, gain)
    native, python = direct.fingerprint(layer), fingerprint_in_python(layer)
    setattr(layer, name, 0.5)
    assert None is not direct.fingerprint(layer) != native
    assert fingerprint_in_python(layer) != python


@needs_torch_2_14
def test_another_gain_or_none(device):
    layer = layer_of(device, gain=True)
    native = direct.fingerprint(layer)
    layer.register_parameter("gain", None)
    assert None is not direct.fingerprint(layer) != native


class Subclass(torch.Tensor):
    pass


def parametrized(layer):
    nn.utils.parametrize.register_parametrization(layer, "weight", nn.Identity())


def replace(value):
    return lambda layer: layer._parameters.__setitem__("weight", value(layer.weight.detach()))


DECLINED = {
    "parametrized": (parametrized, False),
    "a subclass": (replace(lambda t: t.as_subclass(Subclass)), False),
    "no weight": (lambda layer: layer.register_parameter("weight", None), False),
    "made in inference mode": (replace(torch.inference_mode()(torch.clone)), False),
    "numbers of another type": (lambda layer: setattr(layer, "eps", 1), True),
    "a missing number": (lambda layer: (delattr(layer, "eps"), setattr(layer.__class__, "eps", 1.0)), True),
}


@pytest.mark.parametrize(("change", "has_one"), DECLINED.values(), ids=DECLINED)
def test_what_the_native_function_declines(change, has_one, device, capfd):
    class Layer(wa.WAConv2d):
        pass

    layer = Layer(4, 4, 2, device=device)
    change(layer)
    assert direct.fingerprint(layer) is None
    assert bool(fingerprint(layer)) == has_one
    assert fingerprint(layer) == fingerprint(layer)
    assert capfd.readouterr().err == ""
