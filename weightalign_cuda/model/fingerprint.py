"""Fingerprint of what a layer's aligned filters were computed from: they are valid as long as it stays the same."""

from typing import Any

from torch import Tensor
from torch.compiler import is_compiling

from ..functional.checks import PLAIN, TENSORS
from ..nn.layers import Aligned
from ..ops import direct

Fingerprint = tuple[Any, ...] | bytes


def fingerprint(layer: Aligned) -> Fingerprint:
    """Empty if changes of weight and gain cannot be detected: `why_not_plain` says why. Misses writes that torch does
    not version: through `.data`, NumPy, other views of the memory."""
    return direct.fingerprint(layer) or fingerprint_in_python(layer)


def fingerprint_in_python(layer: Aligned) -> tuple[Any, ...]:
    """For what the native function, which asks the same in a third of the time, declines."""
    parameters = layer._parameters
    if "weight" not in parameters or "gain" not in parameters:
        return ()
    weight, gain = parameters["weight"], parameters["gain"]
    if type(weight) not in TENSORS or type(gain) not in PLAIN:
        return ()
    try:
        return fingerprint_with(layer, weight, gain)  # type: ignore[arg-type]
    except RuntimeError:  # an inference tensor has no version
        return ()


def fingerprint_with(layer: Aligned, w: Tensor, gain: Tensor | None) -> tuple[Any, ...]:
    """Fingerprint of a layer with this weight and gain, which may be recomputed at each use."""
    g = w if gain is None else gain  # one flat tuple for both cases: it is made and compared at each use
    return (
        id(w), w._version, w.data_ptr(), w.stride(), w.dtype, w.requires_grad,
        id(g), g._version, g.data_ptr(), g.stride(), g.dtype, g.requires_grad, layer.eps, layer.scale,
    )  # fmt: skip


def has_plain_parameters(layer: Aligned) -> bool:
    """Whether a fingerprint detects changes of weight and gain."""
    if is_compiling():
        return "weight" in layer._parameters and "gain" in layer._parameters
    return why_not_plain(layer) is None


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
    parameters = layer._parameters
    weight, gain = parameters["weight"], parameters["gain"]
    return weight.requires_grad or (gain is not None and gain.requires_grad)  # type: ignore[union-attr]
