"""Converts an existing model to aligned weights: replaces its layers with ours, one by one."""

import logging

import torch
from torch import Tensor, nn

from ..nn.layers import Aligned, aligned_layers
from ..ops.backend import run
from .adapters import forbid_merging, tuner_layers
from .foreach import UNSHARDED, switch
from .select import CLASSES, Rule, Selection, select, torch_class
from .standardised import is_standardised, original, pads_same, take_over
from .swap import check_model, put_in_place, rebuilt
from .unsharded import check_unsharded

logger = logging.getLogger("weightalign_cuda")


def convert(
    model: nn.Module,
    *,
    gain: str = "ones",
    foreach: bool | int = False,
    include: Rule = None,
    exclude: Rule = None,
) -> nn.Module:
    """Replaces the convolutions of a model, in place, with ours: `torch.nn.Conv2d` with `WAConv2d` and so on.

    All are converted (arXiv 2010.07160 aligns the first one, too), except

    - prediction layers: classifiers, and the last layers of detection, segmentation, depth and pose heads, by the names
      and classes of torchvision, timm, transformers, segmentation-models-pytorch, ultralytics, OpenMMLab and others;
      and a pointwise convolution with a bias that ends the model, as in a U-Net. `include` converts them;
    - constants: frozen filters that are all the same; and filters of one value, which would become 0;
    - lazy layers before their first input, and layers with a custom forward or other overridden methods;
    - peft's adapters, and base layers whose weight an adapter reads. Add adapters first: on a converted layer peft
      creates aligned adapters. Merge after `fold`; before it, merging is an error.

    The logger "weightalign_cuda" names the layers that are left: as a warning if it is unknown what a layer computes,
    or if there is nothing to convert. It also warns of frozen layers that get a gain of 1 in a model that is trained.

    Layers that standardise their weights become layers that compute the same: timm's StdConv2d, ScaledStdConv2d and
    their Same variants, those of transformers' BiT, and Composer's, whose parametrization is removed (load its
    checkpoints before). If a model has any, only they are converted: its authors left the other convolutions plain.
    Formulas that no eps can match, as in the original Weight Standardization repository, count as a custom forward.

    Weight and bias stay the same Parameter objects, as does timm's gain, (C, 1, 1, 1); other gains, (C,), are new, with
    the weight's dtype, device and requires_grad: create the optimizer, and wrap in DDP or compile, afterwards. Hooks,
    training mode, memory layout and sharing are kept. Converting again changes nothing. Checkpoints of the original
    model still load, with a gain of 1.

    Args:
        model: any module.
        gain: of plain layers, "ones" or "preserve": sqrt(n/2 * var + eps), so that a layer's aligned weight is at first
            its weight minus the mean of each filter. Use "preserve" to fine-tune a trained model, if normalisation is
            frozen, or if layers are initialised to 0: with "ones" these reach full scale after one small step.
        foreach: True aligns all layers in one launch, when the first one runs in a forward of the model, in the dtype
            required there (the forward may enter autocast), and has one launch in the backward; a number uses that many
            launches, so that DistributedDataParallel sends the first gradients during the backward. Converting again
            switches it on or off. It applies to calls of `model` itself. A layer aligns itself if it is called outside
            of them, in the second run of reentrant checkpointing, or in a part compiled separately; if its weight is
            computed at each use (parametrizations, pruning); and, with a warning, if its weight or autocast changes
            during the forward.
        include: only these layers: a pattern for their names as in `model.named_modules()` ("layer1.*", by fnmatch), a
            list of patterns, or a function (name, module) -> bool. Matches are converted even if they are prediction
            layers; a Linear becomes a WALinear.
        exclude: all but these, in the same form.

    Returns:
        The model itself; if it is a single layer, the new one.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what was given; for weights under
            torch.nn.utils.parametrize, weight_norm, spectral_norm or pruning, and DTensors, unless excluded; for
            quantised convolutions; for scripted and wrapped (DDP, FSDP, torch.compile) models. The model is then
            unchanged.
        RuntimeError: for foreach in a model sharded by FSDP or containing torch.nn.DataParallel, where each layer has
            to align itself; in the forward, if that was applied later.
    """
    check_model(model)
    if gain not in ("ones", "preserve"):
        raise ValueError(f"gain: expected 'ones' or 'preserve', got {gain!r}")
    if not isinstance(foreach, int) or (not isinstance(foreach, bool) and foreach < 1):
        raise ValueError(f"foreach: expected True, False or a number of launches from 1 on, got {foreach!r}")
    if foreach:
        check_unsharded(list(model.modules()), *UNSHARDED)
    selection = select(model, include, exclude)
    gains: dict[object, nn.Parameter] = {}
    new: dict[nn.Module, nn.Module] = {layer: _converted(layer, gain, gains) for layer in selection.chosen}
    _report(model, selection, gain)
    forbid_merging(tuner for tuner in tuner_layers(model) if tuner.base_layer in new)
    model = put_in_place(model, new)
    switch(model, foreach)
    return model


def _report(model: nn.Module, selection: Selection, gain: str) -> None:
    if not selection.chosen and not aligned_layers(model.modules()):
        why = _listed(selection.skipped | selection.unknown) or (
            "no convolution is among the layers that include= and exclude= leave (a Linear is one of them if include= "
            "matches it)"
        )
        logger.warning("convert changes nothing in this model: %s", why)
        return
    if selection.skipped:
        logger.info("convert leaves as they are: %s", _listed(selection.skipped))
    if selection.unknown:
        logger.warning(
            "convert leaves as they are, for it does not know what they compute: %s; the rest of the model is "
            "converted, as include= and exclude= choose",
            _listed(selection.unknown),
        )
    plain = {layer: name for layer, name in selection.chosen.items() if not is_standardised(layer)}
    frozen = [name for layer, name in plain.items() if not layer.weight.requires_grad]
    if gain == "ones" and frozen and any(parameter.requires_grad for parameter in model.parameters()):
        logger.warning(
            "convert: %s are frozen and cannot adapt to a gain of 1, while the rest of the model is trained: "
            'use gain="preserve", or exclude= them',
            ", ".join(frozen),
        )


def _listed(names: dict[str, list[str]]) -> str:
    return "; ".join(f"{', '.join(several)} ({reason})" for reason, several in names.items())


def _converted(layer: nn.Module, gain: str, gains: dict[object, nn.Parameter]) -> Aligned:
    """gains: those created so far, keyed so that layers that share a weight share the gain, too."""
    new = rebuilt(original(layer), CLASSES[torch_class(layer)])
    new.activation, new.eps, new.scale = None, 1e-5, 1.0
    if pads_same(layer):
        new.padding = "same_tf"  # type: ignore[assignment]
    if is_standardised(layer):
        take_over(new, layer)
        return new
    key = new.weight, type(new), getattr(layer, "groups", 1)
    values = _preserving(new) if gain == "preserve" else new.weight.new_ones(new.filters().shape[0])
    new.gain = gains.setdefault(key, nn.Parameter(values, requires_grad=new.weight.requires_grad))
    return new


@torch.no_grad()
def _preserving(layer: Aligned) -> Tensor:
    """sqrt(n/2 * var + eps): the reciprocal of the kernel's statistic."""
    filters = layer.filters()
    options = [filters], [None], [layer.eps], [1.0], filters.dtype, torch.preserve_format
    _, statistics = run("align_forward", filters.device.type, *options)
    return statistics[:, 1].reciprocal().to(filters.dtype)
