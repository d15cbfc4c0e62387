"""Converts weight-standardised convolutions of other libraries, factor * (w - mean) / sqrt(var + eps), to our layers.

Matched by name, so that their libraries need not be imported. Only exactly this formula is supported: not the original
repository of Weight Standardization, with eps outside the root and the unbiased variance.
"""

from torch import nn

from ..nn.layers import Aligned
from .swap import rebuilt

_CLASSES = {
    *(
        f"timm.layers.std_conv.{name}"
        for name in ("StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame")
    ),
    "transformers.models.bit.modeling_bit.WeightStandardizedConv2d",
}
# Composer's parametrization, by torch.nn.utils.parametrize.
_PARAMETRIZATION = "composer.algorithms.weight_standardization.weight_standardization.WeightStandardizer"
_PARAMETRIZATION_EPS = 1e-10
_PARAMETRIZED = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# timm's plain convolution with TensorFlow's padding.
SAME = "timm.layers.conv2d_same.Conv2dSame"


def class_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def is_standardised(module: nn.Module) -> bool:
    return class_name(module) in _CLASSES or _is_parametrized(module)


def _is_parametrized(module: nn.Module) -> bool:
    """Whether Composer alone has parametrized it. (torch replaces the layer's class with a subclass of it.)"""
    if type(module).__mro__[1] not in _PARAMETRIZED or not nn.utils.parametrize.is_parametrized(module):
        return False
    by_name: nn.ModuleDict = module.parametrizations  # type: ignore[assignment]
    made_by = [(name, class_name(each)) for name, several in by_name.items() for each in several]  # type: ignore[attr-defined]
    return made_by == [("weight", _PARAMETRIZATION)]


def original(layer: nn.Module) -> nn.Module:
    """The layer without Composer's parametrization; any other layer as it is."""
    if not _is_parametrized(layer):
        return layer
    plain: nn.Module = rebuilt(layer, type(layer).__mro__[1])
    plain._modules = {name: module for name, module in layer._modules.items() if name != "parametrizations"}
    weight: nn.Parameter = layer.parametrizations.weight.original  # type: ignore[union-attr, assignment]
    plain._parameters = {"weight": weight, **layer._parameters}
    return plain


def pads_same(layer: nn.Module) -> bool:
    """Whether it pads like TensorFlow, depending on its input's size."""
    dynamic = getattr(layer, "same_pad", False) or getattr(layer, "pad", None) is not None
    return class_name(layer) == SAME or (class_name(layer) in _CLASSES and dynamic)


def take_over(new: Aligned, layer: nn.Module) -> None:
    """Sets scale, eps and gain so that `new` computes what `layer` does: numerator and denominator are multiplied by
    sqrt(n/2). Removes the attributes that only `layer` used."""
    n = new.weight.flatten(1).shape[1]
    new.scale = getattr(layer, "scale", 1.0) * (n / 2) ** 0.5
    new.eps = n / 2 * getattr(layer, "eps", _PARAMETRIZATION_EPS)
    new._modules = {name: module for name, module in new._modules.items() if name != "pad"}
    for name in ("same_pad", "gain_init", "pad"):
        new.__dict__.pop(name, None)
    new.register_parameter("gain", new._parameters.get("gain"))
