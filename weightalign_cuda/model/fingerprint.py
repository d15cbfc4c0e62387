"""Fingerprint of what a layer's aligned filters were computed from: they are valid as long as it stays the same."""

from typing import Any

from torch import Tensor
from torch.compiler import is_compiling

from ..functional.checks import PLAIN
from ..nn.layers import Aligned

Fingerprint = tuple[Any, ...]


def fingerprint(layer: Aligned) -> Fingerprint:
    """Misses writes that torch does not version: through `.data`, NumPy, other views of the memory."""
    weight, gain = layer._parameters.get("weight"), layer._parameters.get("gain")
    return () if weight is None else fingerprint_with(layer, weight, gain)  # None: parametrized since


def fingerprint_with(layer: Aligned, w: Tensor, g: Tensor | None) -> Fingerprint:
    """Fingerprint of a layer with this weight and gain, which may be recomputed at each use."""
    own = id(w), w._version, w.data_ptr(), w.stride(), w.dtype, w.requires_grad, layer.eps, layer.scale
    return own if g is None else (*own, id(g), g._version, g.data_ptr(), g.stride(), g.dtype, g.requires_grad)


def has_plain_parameters(layer: Aligned) -> bool:
    """Whether a fingerprint detects changes of weight and gain; if not, `why_not_plain` says why."""
    if "weight" not in layer._parameters or "gain" not in layer._parameters:
        return False
    if is_compiling():
        return True
    weight, gain = layer._parameters["weight"], layer._parameters["gain"]
    are_plain = type(weight) in PLAIN and type(gain) in PLAIN
    return are_plain and not weight.is_inference() and (gain is None or not gain.is_inference())  # type: ignore[union-attr]


def why_not_plain(layer: Aligned) -> str | None:
    for name in ("weight", "gain"):
        if name not in layer._parameters:
            return f"its {name} is made at each use, as by a parametrization or pruning"
        parameter = layer._parameters[name]
        if type(parameter) not in PLAIN:
            return f"its {name} is a {type(parameter).__name__}"
        if parameter is not None and parameter.is_inference():
            return f"its {name} was made in inference mode, where torch does not count changes"
    return None


def is_trained(layer: Aligned) -> bool:
    weight, gain = layer._parameters["weight"], layer._parameters["gain"]
    return weight.requires_grad or (gain is not None and gain.requires_grad)  # type: ignore[union-attr]
