"""torch.fx and tools built on it: layers are leaves, functions are recorded, tensor subclasses are kept."""

import pytest
import timm
import torch
import torchvision
from timm.models._features_fx import create_feature_extractor as timm_extractor
from torch import fx, nn
from torch.fx.experimental.optimization import fuse
from torchvision.models.feature_extraction import create_feature_extractor
from truth import normal

import weightalign_cuda as wa


class Functions(nn.Module):
    """Every function and kind of layer, with arguments other than the defaults."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.convolution = wa.WAConv2d(3, 4, 3, eps=0.2, scale=1.3, padding="same_tf", activation="silu")
        self.transposed = wa.WAConvTranspose2d(5, 3, 2, eps=0.4)
        self.linear = wa.WALinear(3, 2, activation="relu")
        self.weight, self.gain = nn.Parameter(normal(5, 4, 3, 3)), nn.Parameter(normal(5, seed=1, mean=1))

    def forward(self, x):
        options = {"gain": self.gain, "activation": "gelu", "eps": 0.3, "scale": 1.2}
        x = wa.conv2d(self.convolution(x), self.weight, None, 2, "same_tf", **options)
        square = self.weight[:, :1].expand(5, 5, 3, 3)
        prepared, aligned = wa.prepare(x, square, self.gain, padding=1, padding_mode="reflect", eps=0.7)
        (together,) = wa.align_foreach([self.weight], [self.gain], eps=[0.4], scale=0.5)
        alone = wa.align(self.weight, self.gain, scale=0.4)
        x = self.linear(self.transposed(x).mean((2, 3)))
        return x + prepared.std() + aligned.sin().sum() + together.cos().sum() + alone.std()


def test_layers_are_leaves_and_functions_are_recorded():
    model = Functions()
    traced = fx.symbolic_trace(model)
    targets = [node.target for node in traced.graph.nodes]
    assert {"convolution", "transposed", "linear", wa.conv2d, wa.prepare, wa.align_foreach, wa.align} <= set(targets)
    for size in ((9, 8), (12, 13)):
        image = normal(2, 3, *size)
        assert torch.equal(traced(image), model(image))


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("is_folded", [False, True])
def test_converted_model(foreach, is_folded):
    model = wa.convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2)), foreach=foreach)
    model = wa.fold(model) if is_folded else model
    traced, image = fx.symbolic_trace(model), normal(1, 3, 8, 9)
    assert torch.equal(traced(image), model(image))
    traced(image).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("foreach", [False, True])
def test_feature_extractors(foreach):
    """Those of torchvision and timm."""
    image = normal(1, 3, 64, 64)
    model = wa.convert(torchvision.models.resnet18(), foreach=foreach).eval()
    features = create_feature_extractor(model, ["layer2.0.conv1", "flatten"])(image)
    assert features["layer2.0.conv1"].shape == (1, 128, 8, 8)
    torch.testing.assert_close(model.fc(features["flatten"]), model(image))
    nfnet = wa.convert(timm.create_model("test_nfnet"), foreach=foreach).eval()
    for model in (nfnet, wa.fold(nfnet)):
        found = timm_extractor(model, ["final_conv"])(image)
        found = (
            next(iter(found.values())) if isinstance(found, dict) else found[0] if isinstance(found, list) else found
        )
        assert found.shape[1] == model.final_conv.out_channels and found.isfinite().all()


def test_fusing_tools_get_the_aligned_weight_or_an_error():
    """Batch norm must not be folded into a weight that is not aligned."""
    model = nn.Sequential(wa.WAConv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    nn.init.normal_(model[1].running_mean)
    image = normal(1, 3, 8, 8)
    with pytest.raises(RuntimeError, match=r"fuse_conv_bn_eval: expected a layer of torch.nn, .* what wa.fold returns"):
        nn.utils.fusion.fuse_conv_bn_eval(*model)
    with pytest.raises(RuntimeError, match=r"fuse_linear_bn_eval: expected a layer of torch.nn"):
        nn.utils.fusion.fuse_linear_bn_eval(wa.WALinear(3, 4).eval(), nn.BatchNorm1d(4).eval())
    with pytest.raises((AssertionError, NotImplementedError), match="WAConv2d"):
        torch.ao.quantization.fuse_modules(model, [["0", "1"]])
    assert torch.equal(fuse(model)(image), model(image))  # does not know our layers
    fused = nn.utils.fusion.fuse_conv_bn_eval(*wa.fold(model))
    torch.testing.assert_close(fused(image), model(image), rtol=1e-4, atol=1e-5)


class Image(torch.Tensor):
    """Like torchvision's tv_tensors: a subclass, which PyTorch's functions return as well."""


def test_tensor_subclasses():
    weight, gain = normal(4, 3, 3, 3), normal(4, seed=1)
    image = normal(1, 3, 6, 6).as_subclass(Image)
    options = {"gain": gain, "padding": 1, "padding_mode": "reflect", "eps": 0.3, "scale": 1.7}
    found, expected = (wa.conv2d(x, weight, **options) for x in (image, image.as_subclass(torch.Tensor)))
    assert type(found) is Image and torch.equal(found.as_subclass(torch.Tensor), expected)
    assert type(wa.align(weight.as_subclass(Image), gain, eps=0.3)) is Image
    assert torch.equal(wa.align(weight.as_subclass(Image), gain, eps=0.3), wa.align(weight, gain, eps=0.3))
    layer = wa.WAConv2d(3, 4, 3, padding=1, padding_mode="reflect", eps=0.3)
    with torch.no_grad(), wa.frozen(layer.eval()):  # aligned once, not twice
        kept = layer(image)
    torch.testing.assert_close(kept.as_subclass(torch.Tensor), layer(image.as_subclass(torch.Tensor)))
