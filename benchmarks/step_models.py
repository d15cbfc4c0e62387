"""The networks of benchmarks.step, with plain weights, with weights aligned by rivals, and by us."""

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import weightalign_cuda as wa

from .providers import Align, Setting, Truth, compiled, formula, timm_trick

Variant = Callable[[nn.Module], nn.Module]


@dataclass(frozen=True)
class Network:
    """A network, its package, and the class name of the layers whose weights are aligned."""

    name: str
    package: str
    build: Callable[[], nn.Module]
    layer: str
    batches: tuple[int, ...] = (1,)

    def layers(self, model: nn.Module) -> list[nn.Module]:
        return [module for module in model.modules() if type(module).__name__ == self.layer]

    @property
    def is_installed(self) -> bool:
        return importlib.util.find_spec(self.package) is not None

    @property
    def aligns_itself(self) -> bool:
        """Otherwise its layers are torch's plain convolutions, which are aligned by the paper's formula."""
        return self.layer != "Conv2d"


def torchvision_network(name: str, batches: tuple[int, ...]) -> Network:
    def build() -> nn.Module:
        import torchvision

        return getattr(torchvision.models, name)()

    return Network(name, "torchvision", build, "Conv2d", batches)


def timm_network(name: str, layer: str) -> Network:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name)

    return Network(name, "timm", build, layer)


RESNET = torchvision_network("resnet50", (1, 2, 8))
NFNET = timm_network("eca_nfnet_l0", "ScaledStdConv2d")
BIT = timm_network("resnetv2_50x1_bit", "StdConv2d")
NETWORKS = (RESNET, NFNET, BIT)


class AlignedConv2d(nn.Conv2d):
    """A rival's layer: torch's convolution with a gain, and its weight from `aligned`."""

    aligned: Callable[[], Tensor]

    def forward(self, image: Tensor) -> Tensor:
        return self._conv_forward(image, self.aligned(), self.bias)


def variants(network: Network, setting: Setting, with_compile: bool) -> dict[str, Variant]:
    """Functions that turn a fresh model into each provider's, in place."""
    own = {"ours foreach": functools.partial(wa.convert, foreach=True), "ours per layer": wa.convert}
    plain: dict[str, Variant] = {"plain": functools.partial(_plain, network)}
    if network.aligns_itself:
        return {**own, **plain, "timm": lambda model: model}
    rivals: dict[str, Variant] = {
        "eager": functools.partial(_by_layer, network, formula),
        "timm": functools.partial(_by_layer, network, timm_trick),
    }
    if with_compile:
        rivals["compile"] = functools.partial(_by_list, network, compiled(setting))
    return {**own, **plain, **rivals}


def _plain(network: Network, model: nn.Module) -> nn.Module:
    """Replaces standardised layers by torch's, without the gain, which would not take part in the loss."""
    for layer in network.layers(model):
        layer.__class__ = nn.Conv2d
        layer._parameters.pop("gain", None)
    return model


def _rival_layers(network: Network, model: nn.Module) -> list[Any]:
    layers: list[Any] = network.layers(model)
    for layer in layers:
        layer.__class__ = AlignedConv2d
        layer.gain = nn.Parameter(torch.ones_like(layer.weight[:, 0, 0, 0]))
    return layers


def _by_layer(network: Network, function: Truth, model: nn.Module) -> nn.Module:
    """`function(weight, gain)` in each layer's forward."""
    for layer in _rival_layers(network, model):
        layer.aligned = lambda layer=layer: function(layer.weight, layer.gain)
    return model


def _by_list(network: Network, align: Align, model: nn.Module) -> nn.Module:
    """All weights at once, before the model's forward; each layer pops its own, so that none outlives its use."""
    layers, given = _rival_layers(network, model), {}
    for layer in layers:
        layer.aligned = functools.partial(given.pop, layer)

    def before(*_: Any) -> None:
        weights = align([layer.weight for layer in layers], [layer.gain for layer in layers])
        given.update(zip(layers, weights, strict=True))

    model.register_forward_pre_hook(before)
    return model
