"""The paper's networks with CIFAR stems, and small ones for two cores. Without an activation norm, residual networks
start as Fixup's (Zhang, Dauphin, Ma, ICLR 2019)."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import resnet, segmentation, vgg

from . import alignment

NormLayer = Callable[[int], nn.Module]


class Scalars(nn.Module):
    """What Fixup has in place of a norm: one multiplier and one bias for all channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale, self.bias = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x + self.bias


NORMS: dict[str, NormLayer] = {
    "none": Scalars,
    "bn": nn.BatchNorm2d,
    "gn": lambda channels: nn.GroupNorm(min(32, channels // 4), channels),
    "ln": lambda channels: nn.GroupNorm(1, channels),
    "in": lambda channels: nn.InstanceNorm2d(channels, affine=True),
}


def with_classifier(layers: Iterable[nn.Module], channels: int, classes: int) -> nn.Module:
    """With He's initialisation, as torchvision's networks have it."""
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


def small_resnet(blocks: int, width: int) -> Callable[..., nn.Module]:
    """He et al.'s CIFAR networks of 6 * blocks + 2 layers: three stages of torchvision's BasicBlock."""

    def build(norm: NormLayer, classes: int) -> nn.Module:
        layers: list[nn.Module] = [resnet.conv3x3(3, width), norm(width), nn.ReLU()]
        channels = width
        for stage in range(3):
            for i in range(blocks):
                out, stride = width * 2**stage, 2 if stage and not i else 1
                project = stride != 1 or channels != out
                shortcut = nn.Sequential(resnet.conv1x1(channels, out, stride), norm(out)) if project else None
                layers.append(resnet.BasicBlock(channels, out, stride, shortcut, norm_layer=norm))
                channels = out
        return with_classifier(layers, channels, classes)

    return build


def cifar_resnet(block: type, layers: list[int]) -> Callable[..., nn.Module]:
    """torchvision's, with a stem for 32x32 images: a 3x3 convolution, no pooling."""

    def build(norm: NormLayer, classes: int) -> nn.Module:
        model = imagenet_resnet(block, layers)(norm, classes)
        model.conv1 = resnet.conv3x3(3, 64)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = nn.Identity()
        return model

    return build


def imagenet_resnet(block: type, layers: list[int]) -> Callable[..., nn.Module]:
    return lambda norm, classes: resnet.ResNet(block, layers, classes, norm_layer=norm)


def cifar_vgg(width: int) -> Callable[..., nn.Module]:
    """VGG16's 13 convolutions, the first ones of `width` channels, with one linear layer after them. The last pooling
    is the average over what is left, so that 16x16 images are large enough."""

    def build(norm: NormLayer, classes: int) -> nn.Module:
        sizes = [each if each == "M" else each * width // 64 for each in vgg.cfgs["D"][:-1]]
        features = vgg.make_layers(sizes, batch_norm=norm is not Scalars)
        replace_norms(features, norm)
        return with_classifier(features, sizes[-1], classes)

    return build


def replace_norms(model: nn.Module, norm: NormLayer) -> None:
    """For networks of torchvision that only know batch norm."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, norm(module.num_features))


def deeplab(weights: Any = None) -> Callable[..., nn.Module]:
    """DeepLabv3 with a ResNet-50, whose first `weights` torchvision downloads."""

    def build(norm: NormLayer, classes: int) -> nn.Module:
        model = segmentation.deeplabv3_resnet50(weights_backbone=weights, num_classes=classes)
        if norm is not nn.BatchNorm2d:
            replace_norms(model, norm)
        return model

    return build


def chain(depth: int, width: int = 32, padding_mode: str = "zeros") -> Callable[..., nn.Module]:
    """3x3 convolutions, each with its norm and a ReLU, one after the other; He's initialisation."""

    def build(norm: NormLayer, classes: int) -> nn.Module:
        layers: list[nn.Module] = []
        for i in range(depth):
            convolution = nn.Conv2d(width if i else 3, width, 3, padding=1, padding_mode=padding_mode, bias=False)
            layers += [convolution, *([] if norm is Scalars else [norm(width)]), nn.ReLU()]
        return with_classifier(layers, width, classes)

    return build


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "resnet8": small_resnet(1, 16),
    "resnet14": small_resnet(2, 16),
    "vgg16-8": cifar_vgg(8),
    "vgg16-16": cifar_vgg(16),
    "chain50": chain(50),
    "chain150": chain(150),
    "chain50-circular": chain(50, padding_mode="circular"),
    "vgg16": cifar_vgg(64),
    "resnet18": cifar_resnet(resnet.BasicBlock, [2, 2, 2, 2]),
    "resnet34": cifar_resnet(resnet.BasicBlock, [3, 4, 6, 3]),
    "resnet50": cifar_resnet(resnet.Bottleneck, [3, 4, 6, 3]),
    "imagenet-resnet50": imagenet_resnet(resnet.Bottleneck, [3, 4, 6, 3]),
    "deeplabv3-resnet50": deeplab(),
    "deeplabv3-resnet50-imagenet": deeplab(resnet.ResNet50_Weights.IMAGENET1K_V1),
}


def build(network: str, norm: str, align: str, classes: int, gain: str = "ones") -> nn.Module:
    """With weights from torch's global random numbers."""
    model = alignment.align(NETWORKS[network](NORMS[norm], classes), align, gain)
    if norm == "none":
        fixup(model)
    return model


def fixup(model: nn.Module) -> None:
    """Each residual branch starts at 0 because of its last convolution; the others of a branch of m convolutions, of L
    branches, shrink by L^(-1/(2m-2)), which alignment undoes; the classifier starts at 0."""
    blocks = [module for module in model.modules() if isinstance(module, (resnet.BasicBlock, resnet.Bottleneck))]
    for block in blocks:
        names = ("conv1", "conv2", "conv3") if isinstance(block, resnet.Bottleneck) else ("conv1", "conv2")
        *others, last = (getattr(block, name) for name in names)
        with torch.no_grad():
            for layer in others:
                alignment.raw_weight(layer).mul_(len(blocks) ** (-1 / (2 * len(others))))
        nn.init.zeros_(alignment.what_scales(last))
    for module in model.modules() if blocks else ():
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
