"""Filters that a forward of a whole model aligns before its layers need them, and when a layer can use them."""

import contextlib
import logging
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, is_grad_enabled, nn
from torch.autograd.graph import saved_tensors_hooks

from ..functional.checks import device_type, result_dtype
from ..nn.layers import Aligned
from ..torch_private import (
    are_functorch_transforms_active,
    current_graph_task_id,
    is_any_autocast_enabled,
    top_saved_tensors_hooks,
)
from .fingerprint import Fingerprint, fingerprint, is_trained
from .streams import ReadyEvent

if TYPE_CHECKING:
    from .foreach_source import ForeachSource

logger = logging.getLogger("weightalign_cuda")
# For the source of each layer that takes part: its filters, and their fingerprint.
AlignedLayers = dict["ForeachSource", tuple[Tensor, Fingerprint]]


class PrealignedFilters:
    """The aligned filters of one layer."""

    def __init__(self, filters: Tensor, made_from: Fingerprint) -> None:
        self.filters = filters
        self.made_from = made_from
        self.is_kept_for_recomputation = False

    def why_not_for(self, layer: Aligned) -> str | None:
        """Why the layer cannot use them now; None if it can."""
        if self.made_from != fingerprint(layer):
            return "its weight, gain, eps or scale has changed since"
        filters = self.filters
        if is_grad_enabled() and not filters.requires_grad and is_trained(layer):
            return "it is to be trained, but the forward of the model began without gradients"
        if filters.is_inference() and not torch.is_inference_mode_enabled():
            return "it is outside of the inference mode in which the forward of the model began"
        if filters.dtype is not (wanted := wanted_dtype(layer, filters)):
            return f"autocast asks for {wanted} here, and asked for {filters.dtype} when the filters were aligned"
        return None


def wanted_dtype(layer: Aligned, filters: Tensor) -> torch.dtype:
    """The dtype that the layer's filters would have if it aligned them now."""
    return result_dtype("weight", layer.weight, device_type(filters), None)


class ModelForward:
    """A forward of a model with foreach that is running on this thread. A backward may run inside it, and a forward
    inside that.

    The layers are aligned when the first one needs its filters, in the autocast dtype that applies there (the forward
    may enter autocast), but otherwise as at the forward's start: in its grad mode, and without the hooks of an inner
    checkpoint, which would recompute the alignment with a part of the model.
    """

    def __init__(
        self, root: nn.Module, sources: Iterable["ForeachSource"], align: Callable[[], AlignedLayers], is_traced: bool
    ) -> None:
        self.root = root
        self.is_traced = is_traced
        self.sources = set(sources)
        self.align = align
        self.backward = current_graph_task_id()
        self.hook = saving_hook()
        self.is_inference, self.wants_gradients = torch.is_inference_mode_enabled(), is_grad_enabled()
        self.aligned: AlignedLayers | None = None
        self.prealigned: dict[ForeachSource, PrealignedFilters] = {}  # of `aligned`, those that the fast path left out
        self.events: dict[torch.device, ReadyEvent] = {}  # when `aligned` was written, on GPUs
        self.was_autocast = False  # when they were made

    def prealigned_for(self, source: "ForeachSource") -> PrealignedFilters | None:
        if source not in self.sources:
            return None
        aligned = self._align() if self.aligned is None else self.aligned
        if source in aligned and source not in self.prealigned:
            self.prealigned[source] = PrealignedFilters(*aligned[source])
        return self.prealigned.get(source)

    def _align(self) -> AlignedLayers:
        with (
            torch.inference_mode(self.is_inference),
            torch.set_grad_enabled(self.wants_gradients),
            contextlib.nullcontext() if saving_hook() is self.hook else saved_tensors_hooks(_as_is, _as_is),
        ):
            self.aligned = {}  # `align` looks for the filters here
            self.aligned = self.align()
        if torch.cuda.is_initialized():  # asking each tensor takes longer
            devices = {filters.device for filters, _ in self.aligned.values() if filters.is_cuda}
            self.events = {device: ReadyEvent(device) for device in devices}
        self.was_autocast = is_any_autocast_enabled()
        return self.aligned

    def filters_for_unchanged(self, source: "ForeachSource") -> Tensor | None:
        """Fast path of `ForeachSource.find`, for an unchanged layer under unchanged modes. (Without gradients, there is
        nothing to keep for a checkpoint's second run, whatever its hooks.)"""
        if (
            self.aligned is None
            or (found := self.aligned.get(source)) is None
            or (saving_hook() is not self.hook if self.wants_gradients else is_grad_enabled())
            or (self.is_inference and not torch.is_inference_mode_enabled())
            or current_graph_task_id() != self.backward
            or are_functorch_transforms_active()
            or found[1] != fingerprint(source.layer)
            or (
                (self.was_autocast or is_any_autocast_enabled())
                and found[0].dtype is not wanted_dtype(source.layer, found[0])
            )
        ):
            return None
        return self.ready(found[0])

    def ready(self, filters: Tensor) -> Tensor:
        """The same filters, which the current stream may read from now on."""
        if self.events:
            self.events[filters.device].wait(filters)
        return filters

    def warn_once(self, layer: Aligned, reason: str) -> None:
        """Warns once per model."""
        if self.root not in _warned:
            _warned.add(self.root)
            logger.warning(
                "foreach: %r, and others perhaps, is aligned in a launch of its own: %s", self.name_of(layer), reason
            )

    def name_of(self, layer: Aligned) -> str:
        return next(name for name, module in self.root.named_modules() if module is layer)


_warned: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def _as_is(t: Tensor) -> Tensor:
    return t


class _Running(threading.local):
    def __init__(self) -> None:
        self.forwards: list[ModelForward] = []  # the outermost first


running = _Running()


def saving_hook() -> Any:
    """The hook that torch now calls on each tensor saved for the backward."""
    hooks = top_saved_tensors_hooks(False)
    return None if hooks is None else hooks[0]
