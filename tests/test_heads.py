"""wa.convert skips prediction layers, by the names and classes that libraries use: stand-ins for those, and general
rules. The libraries themselves are in test_head_libraries.py."""

import logging

import pytest
from torch import nn

import weightalign_cuda as wa


def plain_convolutions(model):
    return [name for name, module in model.named_modules() if type(module) in (nn.Conv2d, nn.ConvTranspose2d)]


def block(channels, out, kernel=3):
    return nn.Sequential(nn.Conv2d(channels, out, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(out))


class Detect(nn.Module):
    """Like ultralytics' of YOLOv8 and later: boxes from cv2, classes from cv3, one each per feature map."""

    def __init__(self, classes=3, channels=(4, 8)):
        super().__init__()
        self.cv2 = nn.ModuleList(nn.Sequential(block(c, 8), block(8, 8), nn.Conv2d(8, 16, 1)) for c in channels)
        self.cv3 = nn.ModuleList(
            nn.Sequential(nn.Sequential(block(c, 8), block(8, 8, 1)), nn.Conv2d(8, classes, 1)) for c in channels
        )
        self.one2one_cv3 = nn.ModuleList(nn.Sequential(block(c, 8), nn.Conv2d(8, classes, 1)) for c in channels)


class Segment(Detect):
    """Mask coefficients from cv4, and their prototypes, which are features."""

    def __init__(self):
        super().__init__()
        self.proto = nn.Sequential(block(4, 8), nn.ConvTranspose2d(8, 8, 2, 2), block(8, 6, 1))
        self.cv4 = nn.ModuleList(nn.Sequential(block(c, 8), nn.Conv2d(8, 6, 1)) for c in (4, 8))


class Anchors(nn.Module):
    """Like mmdetection's heads: a tower, layers named by what they predict, and lists of them."""

    def __init__(self):
        super().__init__()
        self.retina_cls = nn.Conv2d(4, 6, 3)
        self.conv_centerness = nn.Conv2d(4, 1, 3)
        self.multi_level_conv_obj = nn.ModuleList(nn.Conv2d(4, 1, 1) for _ in range(2))
        self.heatmap_head = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
        self.cls_convs = nn.ModuleList([nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)])


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.up, self.out = (
            nn.Conv2d(3, 4, 3),
            nn.ConvTranspose2d(4, 4, 2),
            nn.Sequential(nn.Conv2d(4, 2, 1)),
        )
        self.norm, self.activation = nn.BatchNorm2d(2, affine=False), nn.Sigmoid()


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.classifier = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
        self.after = nn.Conv2d(3, 4, 3)


class OfTimm(nn.Module):
    def __init__(self):
        super().__init__()
        self.head, self.body = nn.Sequential(nn.Conv2d(4, 2, 3)), nn.Conv2d(3, 4, 3)
        self.pretrained_cfg = {"classifier": ("head.0", "head_of_another")}


STANDS_IN = {
    "detect": (
        Detect,
        ["cv2.0.2", "cv2.1.2", "cv3.0.1", "cv3.1.1", "one2one_cv3.0.1", "one2one_cv3.1.1"],
    ),
    "segment": (
        Segment,
        ["cv2.0.2", "cv2.1.2", "cv3.0.1", "cv3.1.1", "one2one_cv3.0.1", "one2one_cv3.1.1", "cv4.0.1", "cv4.1.1"],
    ),
    "mmdetection": (
        Anchors,
        ["retina_cls", "conv_centerness", "multi_level_conv_obj.0", "multi_level_conv_obj.1", "heatmap_head.2"],
    ),
    "classifier": (Classifier, ["classifier.2"]),
    "timm": (OfTimm, ["head.0"]),
    "U-Net": (UNet, ["out.0"]),
}


@pytest.mark.parametrize(("make", "expected"), STANDS_IN.values(), ids=STANDS_IN)
def test_prediction_layers(caplog, make, expected):
    caplog.set_level(logging.INFO, logger="weightalign_cuda")
    model = nn.Sequential(nn.Conv2d(3, 4, 3), make())
    assert plain_convolutions(wa.convert(model)) == [f"1.{name}" for name in expected]
    assert [r.getMessage() for r in caplog.records] == [
        f"convert leaves as they are: {', '.join(f'1.{name}' for name in expected)} (predictions)"
    ]
    assert plain_convolutions(wa.convert(make(), include="*")) == []
    assert plain_convolutions(wa.convert(make(), include=expected[-1])) == [
        name for name in plain_convolutions(make()) if name != expected[-1]
    ]


OUTPUTS = {
    "3 x 3": (nn.Conv2d(4, 4, 3), False),
    "without bias": (nn.Conv2d(4, 4, 1, bias=False), False),
    "not quite": (nn.Conv2d(4, 4, (1, 2)), False),
    "transposed": (nn.ConvTranspose2d(4, 4, 1), False),
    "a U-Net's": (nn.Conv2d(4, 4, 1), True),
    "in 3 dimensions": (nn.Conv3d(4, 4, 1), True),
}


@pytest.mark.parametrize(("last", "predicts"), OUTPUTS.values(), ids=OUTPUTS)
def test_last_convolution_of_a_model(last, predicts):
    model = wa.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), last))
    assert [isinstance(m, wa.nn.layers.Aligned) for m in model] == [True, True, not predicts]
    assert isinstance(wa.convert(last), wa.nn.layers.Aligned)  # a single layer as the model
    followed = wa.convert(nn.Sequential(type(last)(4, 4, 1), nn.BatchNorm2d(4)))
    assert isinstance(followed[0], wa.nn.layers.Aligned)


def test_timm_backbone_predicts_nothing():
    backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1))
    backbone.pretrained_cfg = {"classifier": "head"}  # with num_classes=0
    assert all(isinstance(layer, wa.nn.layers.Aligned) for layer in wa.convert(backbone))
