"""Weight standardisation of libraries that are not installed for these tests, by stand-ins: Composer's becomes an exact
equivalent, the original repository's cannot. timm's and transformers': test_timm_models.py, test_transformers.py.
"""

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from truth import F64, normal

import weightalign_cuda as wa


class WeightStandardizer(nn.Module):
    """Like Composer's."""

    def forward(self, weight):
        variance, mean = torch.var_mean(weight, dim=list(range(1, weight.dim())), keepdim=True, unbiased=False)
        return (weight - mean) / (torch.sqrt(variance + 1e-10))


WeightStandardizer.__module__ = "composer.algorithms.weight_standardization.weight_standardization"


def standardised(*layers):
    model = nn.Sequential(*layers)
    for layer in model:
        if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            parametrize.register_parametrization(layer, "weight", WeightStandardizer())
    return model


MODELS = {
    "1d": (lambda: (nn.Conv1d(4, 6, 3), nn.Conv1d(6, 2, 1)), (2, 4, 9)),
    "2d": (lambda: (nn.Conv2d(4, 6, 3, groups=2, bias=False), nn.ConvTranspose2d(6, 2, 2)), (2, 4, 6, 5)),
    "3d": (lambda: (nn.Conv3d(4, 6, 3, 1, 1, padding_mode="circular"),), (2, 4, 3, 4, 5)),
}


@pytest.mark.parametrize(("make", "shape"), MODELS.values(), ids=MODELS)
def test_composer(device, make, shape):
    """The same results from the same parameters, under the plain layer's names; unparametrized layers stay."""
    torch.manual_seed(0)
    model = standardised(*make()).to(device, F64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1e-4)  # about the square root of its eps
    image = normal(*shape, dtype=F64, device=device)
    expected = model(image)
    expected.div(1e-4).sin().sum().backward()
    before = {parameter: parameter.grad for parameter in model.parameters()}
    model.zero_grad()
    is_theirs = [parametrize.is_parametrized(layer) for layer in model]
    wa.convert(model)
    assert [isinstance(layer, wa.nn.layers.Aligned) for layer in model] == is_theirs
    output = model(image)
    output.div(1e-4).sin().sum().backward()
    assert (output - expected).abs().max() <= 1e-10 * expected.abs().max()
    assert set(model.parameters()) == before.keys()
    for parameter, gradient in before.items():
        assert (parameter.grad - gradient).abs().max() <= 1e-9 * gradient.abs().max()
    assert list(model.state_dict()) == list(nn.Sequential(*make()).state_dict())


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def test_composer_with_other_changes_is_not_converted(caplog):
    model = standardised(nn.Conv2d(3, 4, 3))
    parametrize.register_parametrization(model[0], "weight", nn.Tanh())
    with pytest.raises(ValueError, match="got a layer parametrized by"):
        wa.convert(model)
    model = standardised(Doubled(3, 4, 3))
    wa.convert(model)
    assert parametrize.is_parametrized(model[0]) and "ParametrizedDoubled has its own forward" in caplog.text


class OfTheRepository(nn.Conv2d):
    """github.com/joe-siyuan-qiao/WeightStandardization: eps outside the root, unbiased variance."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        std = weight.flatten(1).std(dim=1).view(-1, 1, 1, 1) + 1e-5
        return F.conv2d(x, weight / std, self.bias, self.stride, self.padding, self.dilation, self.groups)


def test_inexact_layers_are_skipped_and_named(caplog):
    caplog.set_level(logging.WARNING, logger="weightalign_cuda")
    model = wa.convert(nn.Sequential(OfTheRepository(3, 4, 3), nn.Conv2d(4, 4, 3), OfTheRepository(4, 4, 3)))
    assert [type(layer) for layer in model] == [OfTheRepository, wa.WAConv2d, OfTheRepository]
    (record,) = caplog.records
    assert "0, 2 (test_standardised.OfTheRepository has its own forward)" in record.getMessage()
