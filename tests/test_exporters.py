"""Exporters that know only PyTorch's own operations: torch.jit.trace and both of ONNX's, at sizes not exported."""

import warnings

import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from truth import normal

import weightalign_cuda as wa

SIZES = [(32, 33), (33, 33), (34, 9), (35, 10), (9, 11), (10, 12), (11, 13), (12, 40), (13, 41), (40, 43)]


class SameTF(nn.ModuleList):
    """Side by side, because in sequence the sizes would get too small: plain, with a kernel smaller than its stride,
    dilated."""

    def __init__(self):
        super().__init__(
            [
                wa.WAConv2d(3, 4, 3, stride=2, padding="same_tf", eps=0.2, scale=1.3),
                wa.WAConv2d(3, 4, (2, 3), stride=3, padding="same_tf", activation="gelu"),
                wa.WAConv2d(3, 4, 3, stride=2, dilation=(1, 3), padding="same_tf", bias=False),
            ]
        )

    def forward(self, image):
        return torch.cat([layer(image).flatten(1) for layer in self], 1)


LAYERS = {
    "same_tf": SameTF,
    "padding modes": lambda: nn.Sequential(
        wa.WAConv2d(3, 4, 3, padding=1, padding_mode="reflect", activation="relu"),
        wa.WAConv2d(4, 4, 3, padding=1, padding_mode="circular"),
        wa.WAConv2d(4, 4, 3, padding="same", activation="silu", eps=0.7),
        wa.WAConv2d(4, 4, (2, 3), padding=1, eps=0.4, scale=1.2),  # aligned, otherwise plain
        wa.WAConvTranspose2d(4, 6, 3, groups=2, activation="silu", scale=0.6),
    ),
    "foreach": lambda: wa.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)), foreach=True),
}


@pytest.fixture(params=LAYERS.values(), ids=LAYERS)
def model(request):
    torch.manual_seed(0)
    model = request.param()
    with torch.no_grad():
        for seed, gain in enumerate(wa.gain_parameters(model)):
            gain.copy_(normal(*gain.shape, mean=1, std=0.3, seed=seed))
    return model.eval()


def assert_agrees(exported, model):
    """At sizes that were not exported. Both are float32, with sums of up to 36 products and three layers."""
    for size in SIZES:
        image = normal(1, 3, *size, seed=size[0])
        expected = model(image)
        assert (exported(image) - expected).abs().max() <= 1e-5 * expected.abs().max(), size


@pytest.fixture
def quiet():
    """No warnings, except that TracerWarning, for sizes that a trace would not follow, is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", torch.jit.TracerWarning)
        yield


def test_traced(quiet, model):
    assert_agrees(torch.jit.trace(model, normal(1, 3, 32, 33)), model)


EXPORTS = [(True, True), (False, False)]
ALSO = [pytest.param(*others, marks=pytest.mark.slow) for others in [(True, False), (False, True)]]


@pytest.mark.parametrize(("dynamo", "is_folded"), EXPORTS + ALSO)
def test_onnx(quiet, model, dynamo, is_folded, tmp_path):
    path, image = tmp_path / "model.onnx", normal(1, 3, 32, 33)
    if dynamo:
        any_size = torch.export.Dim.DYNAMIC
        options = {"dynamo": True, "dynamic_shapes": ({2: any_size, 3: any_size},), "verbose": False}
    else:
        options = {"dynamo": False, "input_names": ["image"], "dynamic_axes": {"image": {2: "height", 3: "width"}}}
    torch.onnx.export(wa.fold(model) if is_folded else model, (image,), path, **options)
    assert {node.domain for node in onnx.load(path).graph.node} <= {"", "ai.onnx"}
    session = onnxruntime.InferenceSession(path)
    name = session.get_inputs()[0].name
    assert_agrees(lambda image: torch.from_numpy(session.run(None, {name: image.numpy()})[0]), model)


def test_trained_after_a_trace(quiet, model):
    """A trace keeps the parameters and their gradients. In float64, as sums over an image cancel."""
    model.double()
    traced, image = torch.jit.trace(model, normal(1, 3, 32, 33).double()), normal(1, 3, 13, 41).double()
    found = [torch.autograd.grad(m(image).sin().sum(), list(model.parameters())) for m in (traced, model)]
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
