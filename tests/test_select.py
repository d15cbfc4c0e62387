"""Which layers wa.convert replaces, and which it skips and names."""

import copy
import re

import pytest
import torch
from torch import nn
from truth import normal
from varied import names_of_aligned, network

import weightalign_cuda as wa


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ({"include": "3.*"}, ["3.0", "3.1"]),
        ({"include": ["0", "3.1"]}, ["0", "3.1"]),
        ({"include": lambda name, module: getattr(module, "groups", 1) == 2}, ["3.0"]),
        ({"include": "6"}, ["6"]),
        ({"include": "*", "exclude": "[06]"}, ["3.0", "3.1"]),
        ({"exclude": "3.*"}, ["0"]),
        ({"exclude": ["0", "3.1"]}, ["3.0"]),
        ({"exclude": lambda name, module: isinstance(module, nn.ConvTranspose2d)}, ["0", "3.0"]),
        ({"exclude": "nothing like that"}, ["0", "3.0", "3.1"]),
        ({"include": []}, []),
    ],
)
def test_include_and_exclude(rules, expected):
    model = wa.convert(network(), **rules)
    assert names_of_aligned(model) == expected
    model(normal(2, 3, 8, 8)).sum().backward()
    assert names_of_aligned(wa.convert(model, **rules)) == expected


@pytest.mark.parametrize("as_rule", [str, lambda name: [name], lambda name: lambda own, _: own == name])
def test_shared_layer_matches_by_any_of_its_names(as_rule):
    for name in ("0", "1.0"):
        for rule, expected in (("exclude", ["2"]), ("include", ["0"])):
            conv = nn.Conv2d(3, 3, 3)
            model = nn.Sequential(conv, nn.Sequential(conv), nn.Conv2d(3, 3, 3))
            assert names_of_aligned(wa.convert(model, **{rule: as_rule(name)})) == expected
            assert model[0] is model[1][0]


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Preset(nn.Conv2d):
    """Like torchvision's Conv3DSimple: its own constructor and a helper, but torch's behaviour."""

    def __init__(self, channels):
        super().__init__(channels, channels, 3, padding=1)

    @staticmethod
    def helper():
        return 1


def test_skipped_layers_are_named(log):
    """In a warning if it is unknown what they compute, since the model is then converted only in part."""
    patched = nn.Conv2d(3, 3, 3)
    patched.forward = lambda x: x
    model = nn.Sequential(nn.Conv2d(4, 4, 1, groups=4), nn.LazyConv2d(4, 3), Doubled(3, 3, 3), Preset(3), patched)
    wa.convert(model)
    assert names_of_aligned(model) == ["3"] and type(model[3]) is wa.WAConv2d
    assert [(r.name, r.levelname, r.getMessage()) for r in log.records] == [
        (
            "weightalign_cuda",
            "INFO",
            "convert leaves as they are: 0 (filters of one value, which would be constant 0); 1 (not initialised yet)",
        ),
        (
            "weightalign_cuda",
            "WARNING",
            "convert leaves as they are, for it does not know what they compute: 2 (test_select.Doubled has its own "
            "forward); 4 (a forward set on the object, as accelerate's hooks are: convert before); the rest of "
            "the model is converted, as include= and exclude= choose",
        ),
    ]
    log.clear()
    wa.convert(nn.Sequential(Doubled(3, 3, 3), Preset(3)), exclude="0")
    assert not log.records


def test_layers_whose_weight_is_used_by_others_are_skipped(log):
    model = nn.TransformerEncoderLayer(8, 2, 16)
    wa.convert(model, include="*")
    assert names_of_aligned(model) == [] and "used by MultiheadAttention itself" in log.records[0].getMessage()


def frozen(layer, weight=None):
    if weight is not None:
        layer.weight.data.copy_(weight)
    return layer.requires_grad_(False)


BINOMIAL = torch.tensor([1.0, 2.0, 1.0]).outer(torch.tensor([1.0, 2.0, 1.0])) / 16
CONSTANTS = {
    "expectation": (nn.Conv2d(16, 1, 1, bias=False), torch.arange(16.0).view(1, 16, 1, 1)),
    "blur": (nn.Conv2d(4, 4, 3, groups=4, bias=False), BINOMIAL),
    "transposed": (nn.ConvTranspose2d(4, 4, 3, groups=2), BINOMIAL * torch.tensor([1.0, 2, 1, 2]).view(4, 1, 1, 1)),
}


@pytest.mark.parametrize(("layer", "weight"), CONSTANTS.values(), ids=CONSTANTS)
def test_constants_are_skipped(log, layer, weight):
    layer = frozen(copy.deepcopy(layer), weight)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), layer, nn.BatchNorm2d(4))
    assert names_of_aligned(wa.convert(model, include="*")) == ["0"]
    (record,) = log.records
    assert record.getMessage() == "convert leaves as they are: 1 (frozen filters that are all the same, a constant)"
    trained = copy.deepcopy(layer).requires_grad_()
    other = frozen(copy.deepcopy(layer), normal(*layer.weight.shape))
    unknown = copy.deepcopy(layer).to("meta")
    expected = ["0"] if layer.out_channels == 1 else ["0", "1", "2"]  # a single filter is always a constant
    assert names_of_aligned(wa.convert(nn.Sequential(trained, other, unknown))) == expected


def test_frozen_layers_among_trained_ones_are_named(log):
    """They cannot adapt to a gain of 1."""

    def model():
        return nn.Sequential(frozen(nn.Conv2d(3, 4, 3)), nn.Conv2d(4, 4, 3), frozen(nn.Conv2d(4, 4, 3)))

    wa.convert(model())
    (record,) = log.records
    assert record.levelname == "WARNING" and record.getMessage() == (
        "convert: 0, 2 are frozen and cannot adapt to a gain of 1, while the rest of the model is trained: "
        'use gain="preserve", or exclude= them'
    )
    log.clear()
    wa.convert(model(), gain="preserve")
    wa.convert(model(), exclude=["0", "2"])
    wa.convert(frozen(model()))
    assert not log.records
    wa.convert(nn.Sequential(*frozen(model()), nn.Flatten(), nn.Linear(4, 2)))
    assert log.records[0].getMessage().startswith("convert: 0, 1, 2 are frozen")


NOTHING = {
    "unknown": ([Doubled(3, 3, 3), nn.Conv2d(3, 3, 1)], {}, r"1 \(predictions\); 0 \(test_select.Doubled has its own"),
    "linear": ([nn.Linear(4, 4)], {}, "no convolution is among the layers that include= and exclude= leave"),
    "rules": ([nn.Conv2d(3, 3, 3)], {"exclude": "*"}, "no convolution is among the layers"),
}


@pytest.mark.parametrize(("layers", "rules", "why"), NOTHING.values(), ids=NOTHING)
def test_nothing_to_convert(log, layers, rules, why):
    wa.convert(nn.Sequential(*layers), **rules)
    (record,) = log.records
    assert record.levelname == "WARNING"
    assert re.match(f"convert changes nothing in this model: {why}", record.getMessage())
    log.clear()
    wa.convert(nn.Sequential(wa.WAConv2d(3, 3, 3), nn.Linear(4, 4)))
    assert not log.records
