"""For inference: each layer's weight is aligned once, not at each forward."""

import contextlib
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..functional.checks import autocast_dtype, check_module, device_type
from ..nn.layers import Aligned, aligned_by, aligned_layers
from ..nn.parameters import parameter
from ..torch_private import are_functorch_transforms_active, is_functorch_wrapped
from .fingerprint import fingerprint_with
from .streams import ReadyEvent, is_captured


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[nn.Module]:
    """Context in which each layer of the model aligns its weight at its first forward and keeps the result.

    For validation between epochs, where `fold` would be a detour. Parameters may change inside (load_state_dict, an
    averaged copy, `model.half()`, an optimizer's step): a layer aligns again when its weight or gain has changed. Only
    writes that torch does not count go unnoticed: in place through `.data`, NumPy or another view of the memory. So
    swap averaged weights in before, not inside, where a library does it by `param.data.copy_` (torch_ema, diffusers'
    EMAModel). Under autocast weights are kept in its dtype.

    No gradient reaches weight and gain: in eval mode they are constants (gradients of inputs are right); of a layer in
    training mode the backward raises. Inside torch.compile, of parameters that torch.func transforms, and while a CUDA
    graph is captured (whose replays outlive the context) nothing is kept: each call, or replay, aligns.

    Args:
        model: any module.

    Yields:
        The model.

    Raises:
        TypeError: for a model that is none.
        RuntimeError: in a backward that would train an aligned layer; at a forward, for parameters made under
            torch.inference_mode, whose changes torch does not count.
    """
    check_module(model)
    kept = {layer: _Kept(layer) for layer in aligned_layers(model.modules())}

    def forget(*_: Any) -> None:
        for each in kept.values():
            each.made_from = ()

    # Fused optimizers change parameters without counting it.
    handle = register_optimizer_step_post_hook(forget)
    try:
        with aligned_by(kept):
            yield model
    finally:
        handle.remove()


class _Kept:
    """The aligned filters of one layer, for as long as nothing that they come from has changed."""

    name = "frozen"

    def __init__(self, layer: Aligned) -> None:
        self.layer = layer
        self.made_from: tuple[Any, ...] = ()
        self.alive: tuple[Any, ...] = ()  # what has an id or an address there, which nothing else may get meanwhile
        self.filters: Tensor
        self.ready: ReadyEvent

    def __call__(self) -> Tensor:
        layer = self.layer
        weight, gain = parameter(layer, "weight"), parameter(layer, "gain")
        sources = (weight,) if gain is None else (weight, gain)
        if (
            is_compiling()
            or (are_functorch_transforms_active() and any(map(is_functorch_wrapped, sources)))
            or is_captured(weight)
        ):
            return layer.align_filters()
        made_from = fingerprint_with(layer, weight, gain), layer.training, autocast_dtype(device_type(weight))
        if made_from != self.made_from:
            # Not an inference tensor: it may be used after an inference_mode inside.
            with torch.inference_mode(False), torch.no_grad():
                self.filters = layer.align_filters()
            self.ready = ReadyEvent(self.filters.device)
            self.made_from, self.alive = made_from, (sources, [t.detach() for t in sources])
            if layer.training and any(t.requires_grad for t in sources):
                self.filters.requires_grad_().register_hook(_refuse)
        self.ready.wait(self.filters)
        return self.filters


def _refuse(_: Tensor) -> NoReturn:
    raise RuntimeError("wa.frozen is for inference: gradients do not reach weight and gain; train outside of it")
