"""For deployment: plain layers of torch.nn with the aligned weights baked in."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ._padding import same_tf
from ._select import CLASSES, own_behaviour, torch_class
from ._swap import check_plain, put_in_place, rebuilt
from .functional import align
from .layers import Aligned
from .reference_input import activate, pad


def fold(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """A model that computes the same with plain layers of torch.nn, whose weights are the aligned ones.

    Of the aligned weight (arXiv 2010.07160, eq. 10) nothing depends on the input, so nothing is left to compute: the
    result needs neither this package's ops nor its gains, exports (torch.export, ONNX), and its state_dict is that of
    the plain model. A layer with an activation or TensorFlow's padding becomes a small subclass of torch's layer that
    does that in PyTorch's own operations (`weightalign_cuda.fold.FoldedConv2d` and so on). Folding again changes
    nothing. Weights keep their dtype, in which they are aligned, their layout and requires_grad; hooks are kept.

    Args:
        model: any module.
        inplace: swap the layers of `model` itself; else of a deep copy.

    Returns:
        The folded model; if it is one layer, the new one, also in place.

    Raises:
        TypeError: for a model that is none.
        ValueError: for layers parametrized or pruned by torch.nn.utils, compiled, or of subclasses of ours with a
            forward of their own. Nothing has been changed then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    for name, layer in model.named_modules():
        if isinstance(layer, Aligned):
            check_plain(name, layer)
            if own := own_behaviour(layer, CLASSES[torch_class(layer)]):
                got = f"{type(layer).__name__} at {name!r}, which has its own {', '.join(sorted(own))}"
                raise ValueError(f"model: expected layers of this package, got {got}")
    if not inplace:
        model = copy.deepcopy(model)
    weights: dict[Any, nn.Parameter] = {}
    layers = [layer for layer in model.modules() if isinstance(layer, Aligned)]
    return put_in_place(model, {layer: _folded(layer, weights) for layer in layers})


def _folded(layer: Aligned, weights: dict[Any, nn.Parameter]) -> nn.Module:
    """weights: those made so far, by what they were made of: what was shared stays shared."""
    plain, pads_same = torch_class(layer), getattr(layer, "padding", None) == "same_tf"
    new = rebuilt(layer, FOLDED[plain] if pads_same or layer.activation else plain)
    del new._parameters["gain"]
    key = layer.weight, layer.gain, layer.eps, layer.scale, plain, getattr(layer, "groups", 1)
    if key not in weights:
        weights[key] = _aligned_parameter(layer)
    new.weight = weights[key]
    for name in ("eps", "scale", "aligned_by"):
        new.__dict__.pop(name, None)
    if isinstance(new, _Folded):
        new.pads_same = pads_same
        if pads_same:
            new.padding = (0,) * len(layer.kernel_size)  # type: ignore[arg-type]
    else:
        del new.activation
    return new


@torch.no_grad()
def _aligned_parameter(layer: Aligned) -> nn.Parameter:
    weight = layer.weight
    aligned = align(layer.filters(), layer.gain, eps=layer.eps, scale=layer.scale, dtype=weight.dtype)
    values = torch.empty_like(weight).copy_(layer.as_weight(aligned))
    return nn.Parameter(values, requires_grad=weight.requires_grad)


class _Folded(nn.Module):
    """A layer of torch.nn after an activation of its input and TensorFlow's padding."""

    activation: str | None
    pads_same: bool

    def forward(self, input: Tensor, *args: Any) -> Tensor:
        input = activate(input, self.activation)
        if self.pads_same:
            kernel: Any = self.kernel_size
            sizes: Any = kernel, self.stride, self.dilation
            pairs = same_tf(input.shape[-len(kernel) :], *sizes)
            input = pad(input, [n for pair in pairs for n in pair], self.padding_mode)  # type: ignore[arg-type]
        return super().forward(input, *args)

    def extra_repr(self) -> str:
        padding = ", padding=same_tf" if self.pads_same else ""
        activation = f", activation={self.activation}" if self.activation else ""
        return f"{super().extra_repr()}{padding}{activation}"


class FoldedConv1d(_Folded, nn.Conv1d):
    """A folded `WAConv1d` with an activation or TensorFlow's padding."""


class FoldedConv2d(_Folded, nn.Conv2d):
    """A folded `WAConv2d` with an activation or TensorFlow's padding."""


class FoldedConv3d(_Folded, nn.Conv3d):
    """A folded `WAConv3d` with an activation or TensorFlow's padding."""


class FoldedConvTranspose1d(_Folded, nn.ConvTranspose1d):
    """A folded `WAConvTranspose1d` with an activation."""


class FoldedConvTranspose2d(_Folded, nn.ConvTranspose2d):
    """A folded `WAConvTranspose2d` with an activation."""


class FoldedConvTranspose3d(_Folded, nn.ConvTranspose3d):
    """A folded `WAConvTranspose3d` with an activation."""


class FoldedLinear(_Folded, nn.Linear):
    """A folded `WALinear` with an activation."""


FOLDED: dict[type[nn.Module], type[_Folded]] = {
    nn.Conv1d: FoldedConv1d,
    nn.Conv2d: FoldedConv2d,
    nn.Conv3d: FoldedConv3d,
    nn.ConvTranspose1d: FoldedConvTranspose1d,
    nn.ConvTranspose2d: FoldedConvTranspose2d,
    nn.ConvTranspose3d: FoldedConvTranspose3d,
    nn.Linear: FoldedLinear,
}
