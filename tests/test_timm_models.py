"""Whole models of timm and torchvision: weight-standardised ones become exact equivalents, plain ones equal themselves
with aligned weights."""

import copy
import pathlib
import re
from dataclasses import replace
from functools import partial

import pytest
import timm
import torch
import torchvision
from timm.layers import StdConv2d, StdConv2dSame
from timm.models.nfnet import NormFreeNet, _dm_nfnet_cfg
from timm.models.resnetv2 import ResNetV2
from timm.optim import param_groups_weight_decay
from timm.utils import adaptive_clip_grad
from torch import nn
from truth import F64, formula, normal

import weightalign_cuda as wa

SMALL_BIT = {"layers": (1, 2, 1, 1), "channels": (128, 128, 256, 256), "stem_chs": 32, "num_classes": 7}
DM_NFNET = replace(_dm_nfnet_cfg((1, 2, 1, 1), channels=(32, 48, 64, 96)), group_size=8, stem_chs=16, num_features=64)
STANDARDISED = {
    "BiT": lambda: ResNetV2(**SMALL_BIT, stem_type="fixed", conv_layer=partial(StdConv2d, eps=1e-8)),
    "BiT of ViT hybrids": lambda: ResNetV2(
        **SMALL_BIT, stem_type="same", conv_layer=partial(StdConv2dSame, eps=1e-8), preact=False
    ),
    "NFNet of DeepMind": lambda: NormFreeNet(DM_NFNET, num_classes=7),
    "NFNet": lambda: timm.create_model("test_nfnet", num_classes=7),
}


@pytest.fixture(params=STANDARDISED.values(), ids=STANDARDISED)
def standardised(request, device):
    torch.manual_seed(0)
    model = request.param().eval().to(device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gain"):  # all 1, or 0 where a branch starts at zero
                parameter.copy_(1 + normal(*parameter.shape, seed=2, std=0.3))
    return model


def results(model, image):
    """Output, and gradients by name."""
    output = model(image)
    output.sin().sum().backward()
    return output, {name: parameter.grad for name, parameter in model.named_parameters()}


def test_standardised_models_in_float64(native, device, standardised):
    theirs = standardised.double()
    ours = wa.convert(copy.deepcopy(theirs))
    image = normal(2, 3, 65, 54, dtype=F64, device=device)
    (output, gradients), (true_output, true_gradients) = results(ours, image), results(theirs, image)
    assert output.std() > 1e-3 and (output - true_output).abs().max() <= 1e-9 * true_output.abs().max()
    assert gradients.keys() == true_gradients.keys()
    for name, true in true_gradients.items():
        assert (gradients[name] - true).abs().max() <= 1e-9 * true.abs().max(), name
    theirs_by_name = dict(theirs.named_modules())
    for name, layer in ours.named_modules():
        is_standardised = "StdConv" in type(theirs_by_name[name]).__name__
        assert isinstance(layer, wa.WAConv2d) == is_standardised
        assert not is_standardised or not {"same_pad", "gain_init"} & layer.__dict__.keys()
    modules = list(ours.modules())
    assert all(a is b for a, b in zip(modules, wa.convert(ours).modules(), strict=True))


def test_standardised_models_in_float32(native, device, standardised):
    """At most twice as far from float64 as timm's own result (or 1e-5)."""
    image = normal(2, 3, 65, 54, device=device)
    with torch.no_grad():
        truth = copy.deepcopy(standardised).double()(image.double())
        theirs = standardised(image)
        ours = wa.convert(standardised)(image)
    largest = truth.abs().max()
    allowed = max(2 * (theirs - truth).abs().max(), 1e-5 * largest)
    assert (ours - truth).abs().max() <= allowed


def test_parameters_are_timms(standardised):
    """The same objects, with timm's shapes and order: for optimizers that hold them, and checkpoints both ways."""
    before, saved = dict(standardised.named_parameters()), copy.deepcopy(standardised).state_dict()
    theirs = copy.deepcopy(standardised)
    ours = wa.convert(standardised)
    after = dict(ours.named_parameters())
    assert list(after) == list(before) and all(after[name] is parameter for name, parameter in before.items())
    assert all(gain.dim() == 4 for gain in wa.gain_parameters(ours))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.zero_()
    theirs.load_state_dict(ours.state_dict())
    assert all(torch.equal(saved[name], value) for name, value in theirs.state_dict().items())
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.zero_()
    ours.load_state_dict(saved)
    assert all(torch.equal(saved[name], value) for name, value in ours.state_dict().items())


def test_training_tools_of_timm(device):
    """Adaptive clipping depends on a parameter's dimensions, as does the choice of parameters without weight decay."""
    torch.manual_seed(0)
    theirs = timm.create_model("test_nfnet", num_classes=7).to(device, F64)
    with torch.no_grad():
        for gain in (p for name, p in theirs.named_parameters() if name.endswith("gain")):
            gain.copy_(normal(*gain.shape, seed=2, mean=1, std=0.3))
    ours = wa.convert(copy.deepcopy(theirs))
    image = normal(2, 3, 65, 54, dtype=F64, device=device)
    (_, gradients), (_, true_gradients) = results(ours, image), results(theirs, image)
    unclipped = {name: gradient.clone() for name, gradient in true_gradients.items()}
    for model in (ours, theirs):
        adaptive_clip_grad(model.parameters(), clip_factor=0.05)
    for name, true in true_gradients.items():
        assert gradients[name].shape == true.shape
        assert (gradients[name] - true).abs().max() <= 1e-9 * true.abs().max(), name
    clipped = [(unclipped[name] != true).view(len(true), -1).any(1) for name, true in true_gradients.items()]
    assert any(0 < rows.sum() < len(rows) for rows in clipped)  # some filters but not all

    def decayed(model):
        groups = param_groups_weight_decay(model, 0.1)
        decays = {parameter: group["weight_decay"] for group in groups for parameter in group["params"]}
        return {name: decays[parameter] for name, parameter in model.named_parameters()}

    assert decayed(ours) == decayed(theirs)
    assert {decay for name, decay in decayed(ours).items() if name.endswith("gain")} == {0.1}


PLAIN = {  # models, and their convolutions that stay plain
    "timm resnet": (partial(timm.create_model, "test_resnet"), ()),
    "timm byobnet": (partial(timm.create_model, "test_byobnet"), ()),
    "timm convnext": (partial(timm.create_model, "test_convnext"), ()),
    "timm efficientnet": (partial(timm.create_model, "test_efficientnet"), ()),
    "timm mambaout": (partial(timm.create_model, "test_mambaout"), ()),
    "timm of tensorflow": (partial(timm.create_model, "tf_mobilenetv3_small_minimal_100"), ()),
    "torchvision squeezenet": (torchvision.models.squeezenet1_1, ("classifier.1",)),
    "torchvision mobilenet": (torchvision.models.mobilenet_v3_small, ()),
    "torchvision shufflenet": (torchvision.models.shufflenet_v2_x0_5, ()),
    "torchvision segmentation": (
        partial(torchvision.models.segmentation.lraspp_mobilenet_v3_large, weights=None, weights_backbone=None),
        ("classifier.low_classifier", "classifier.high_classifier"),
    ),
    "torchvision video": (partial(torchvision.models.video.mc3_18, num_classes=5), ()),
}


@pytest.mark.parametrize(("make", "plain"), PLAIN.values(), ids=PLAIN)
def test_plain_models(device, make, plain):
    torch.manual_seed(0)
    model = make().to(device, F64).eval()
    converted = wa.convert(copy.deepcopy(model))
    image = normal(
        1, 3, *((4, 32, 32) if "VideoResNet" in type(model).__name__ else (64, 64)), dtype=F64, device=device
    )
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, (nn.Conv2d, nn.Conv3d)):
                assert isinstance(converted.get_submodule(name), wa.nn.layers.Aligned) == (name not in plain), name
                if name not in plain:
                    module.weight.copy_(formula(module.weight))
        expected, output = model(image), converted(image)
    if isinstance(expected, dict):
        expected, output = expected["out"], output["out"]
    assert expected.std() > 0 and (output - expected).abs().max() <= 1e-9 * expected.abs().max()


def test_timm_is_not_imported():
    """The package recognises timm's layers without importing it."""
    sources = pathlib.Path(wa.__file__).parent.rglob("*.py")
    assert not [p.name for p in sources if re.search(r"^\s*(import|from) timm", p.read_text(), re.MULTILINE)]
