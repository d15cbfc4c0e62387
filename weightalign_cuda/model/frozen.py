"""For inference: each layer's weight is aligned once, not in each forward."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..functional.checks import check_module, device_type, untraced_autocast_dtype
from ..nn.layers import Aligned, aligned_by, aligned_layers
from ..nn.parameters import parameter
from ..ops import direct
from ..torch_private import are_functorch_transforms_active, is_functorch_wrapped
from .fingerprint import fingerprint_with
from .shard_group import GatheredFilters
from .streams import ReadyEvent, is_captured


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[nn.Module]:
    """Context in which each layer of the model aligns its weight in its first forward and keeps the result.

    For validation between epochs, where `fold` is inconvenient. Parameters may change inside (load_state_dict,
    averaged weights, `model.half()`, an optimizer step): a layer aligns again when its weight or gain has changed. Only
    writes that torch does not version go unnoticed: in place through `.data`, NumPy or another view of the memory. If a
    library swaps in averaged weights by `param.data.copy_` (torch_ema, diffusers' EMAModel), do that before, not
    inside. Under autocast weights are kept in its dtype.

    Weights and gains get no gradients: in eval mode they are constants (gradients of inputs are correct); in training
    mode the layer's backward raises. Nothing is kept inside torch.compile, for parameters transformed by torch.func,
    during CUDA graph capture (replays outlive the context) and for layers sharded by `fully_shard`: each call, replay
    or gather aligns.

    Args:
        model: any module.

    Yields:
        The model.

    Raises:
        TypeError: if the model is not a torch.nn.Module.
        RuntimeError: in a backward that would train an aligned layer; in a forward, for parameters created under
            torch.inference_mode, whose changes torch does not version.
    """
    check_module(model)
    layers = aligned_layers(model.modules())
    sharded = {x: _Gathered(x, x.aligned_by) for x in layers if isinstance(x.aligned_by, GatheredFilters)}
    kept = {layer: _Kept(layer) for layer in layers if layer not in sharded}

    def forget(*_: Any) -> None:
        for each in kept.values():
            each.made_from = ()

    # Fused optimizers change parameters without increasing their version.
    handle = register_optimizer_step_post_hook(forget)
    try:
        with aligned_by({**kept, **sharded}):
            yield model
    finally:
        handle.remove()


class _Kept:
    """The aligned filters of one layer, valid as long as nothing that they depend on has changed."""

    name = "frozen"

    def __init__(self, layer: Aligned) -> None:
        self.layer = layer
        self.made_from: tuple[Any, ...] = ()
        self.alive: tuple[Any, ...] = ()  # keeps the ids and addresses in made_from from being reused
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
        state = direct.fingerprint(layer) or fingerprint_with(layer, weight, gain)
        made_from = state, layer.training, untraced_autocast_dtype(device_type(weight))
        if made_from != self.made_from:
            # Not an inference tensor: it may be used after an inner inference_mode has ended.
            with torch.inference_mode(False), torch.no_grad():
                self.filters = layer.align_filters()
            self.ready = ReadyEvent(self.filters.device)
            self.made_from, self.alive = made_from, (sources, [t.detach() for t in sources])
            _forbid_training(layer, self.filters, sources)
        self.ready.wait(self.filters)
        return self.filters


class _Gathered:
    """The aligned filters of one layer sharded by `fully_shard`: they last until FSDP2 frees them."""

    name = "frozen"

    def __init__(self, layer: Aligned, source: GatheredFilters) -> None:
        self.layer = layer
        self.source = source

    def __call__(self) -> Tensor:
        gathered = self.source()
        filters = gathered.detach()
        _forbid_training(self.layer, filters, (gathered,))
        return filters


def _forbid_training(layer: Aligned, filters: Tensor, sources: Iterable[Tensor]) -> None:
    if layer.training and any(t.requires_grad for t in sources):
        filters.requires_grad_().register_hook(_refuse)


def _refuse(_: Tensor) -> NoReturn:
    raise RuntimeError("wa.frozen is for inference: gradients do not reach weight and gain; train outside of it")
