"""Folding for deployment: plain layers of torch.nn with the aligned weights baked in."""

import copy
from typing import Any

import torch
from torch import nn

from ..functional.alignment import align
from ..nn.folded import FOLDED, Folded
from ..nn.layers import Aligned, aligned_layers
from .foreach import switch_off_all
from .select import CLASSES, overridden_methods, torch_class
from .swap import check_model, check_plain, put_in_place, rebuilt


def fold(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Returns an equivalent model of plain torch.nn layers, whose weights are the aligned ones.

    The aligned weight (arXiv 2010.07160, eq. 10) does not depend on the input, so nothing is left to compute: the
    result needs neither this package's ops nor its gains, exports (torch.export, ONNX), and has the state_dict of the
    plain model. A layer with an activation or TensorFlow's padding becomes a small subclass of torch's layer that does
    these in PyTorch's own ops (`weightalign_cuda.folded.FoldedConv2d` and so on). Folding again changes nothing.
    Weights are aligned in their own dtype, and keep it, their layout and requires_grad; hooks are kept. Fold before
    calling a model's own methods that merge weights (timm's `reparameterize`).

    Args:
        model: any module.
        inplace: replace the layers of `model` itself; otherwise those of a deep copy.

    Returns:
        The folded model; if it is a single layer, the new one, also with inplace.

    Raises:
        TypeError: if the model is not a torch.nn.Module, or is scripted or wrapped (DDP, FSDP, torch.compile).
        ValueError: for layers parametrized or pruned by torch.nn.utils, compiled, sharded (DTensors), or of subclasses
            of ours that override methods. The model is then unchanged.
    """
    check_model(model)
    for name, layer in model.named_modules():
        if isinstance(layer, Aligned):
            check_plain(name, layer, "fold the unsharded model, with the full state dict loaded into it")
            if own := overridden_methods(layer, CLASSES[torch_class(layer)]):
                got = f"{type(layer).__name__} at {name!r}, which has its own {', '.join(sorted(own))}"
                raise ValueError(f"model: expected layers of this package, got {got}")
    if not inplace:
        model = copy.deepcopy(model)
    switch_off_all(model)
    weights: dict[Any, nn.Parameter] = {}
    return put_in_place(model, {layer: _folded(layer, weights) for layer in aligned_layers(model.modules())})


def _folded(layer: Aligned, weights: dict[Any, nn.Parameter]) -> nn.Module:
    """weights: those aligned so far, keyed by what they depend on, so that shared weights stay shared."""
    plain, pads_same = torch_class(layer), getattr(layer, "padding", None) == "same_tf"
    new = rebuilt(layer, FOLDED[plain] if pads_same or layer.activation else plain)
    del new._parameters["gain"]
    key = layer.weight, layer.gain, layer.eps, layer.scale, plain, getattr(layer, "groups", 1)
    if key not in weights:
        weights[key] = _aligned_parameter(layer)
    new.weight = weights[key]
    for name in ("eps", "scale", "aligned_by"):
        new.__dict__.pop(name, None)
    if isinstance(new, Folded):
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
