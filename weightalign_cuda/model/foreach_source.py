"""Source of a foreach layer's filters, in a forward of the model and when activation checkpointing runs the layer again
in the backward."""

import logging
import threading
from typing import Any

from torch import Tensor
from torch.compiler import is_dynamo_compiling

from ..nn.layers import Aligned
from ..torch_private import are_functorch_transforms_active, backward_keeps_graph, current_graph_task_id
from .fingerprint import why_not_plain
from .prealigned import PrealignedFilters, logger, running, saving_hook


class _Traced(threading.local):
    """The filters in a forward that torch.compile traced. A graph cannot check whether a weight has changed since."""

    def __init__(self) -> None:
        self.filters: Tensor | None = None


class ForeachSource:
    """Provides one layer's filters: those that a forward of the whole model has aligned, if the layer can use them;
    otherwise the layer aligns its own.

    Non-reentrant activation checkpointing runs a layer again in the backward to recompute saved tensors, and drops the
    graph of that run. The layer then gets the same filters again, as a leaf. They are kept until their gradient has
    arrived or their graph is gone. With reentrant checkpointing gradients flow through the second run, in which the
    layer aligns itself.
    """

    name = "foreach"

    def __init__(self, layer: Aligned) -> None:
        self.layer = layer
        self.kept: set[PrealignedFilters] = set()
        self.traced = _Traced()

    def __call__(self) -> Tensor:
        if is_dynamo_compiling():
            filters = self.traced.filters
        else:
            forwards = running.forwards
            # Without a forward: an exporter's, if one traces this without torch.compile.
            filters = forwards[0].filters_for_unchanged(self) if forwards else self.traced.filters
            if filters is None:
                prealigned = self.find()
                filters = self.kept_filters() if prealigned is None else prealigned.filters
            if filters is None and logger.isEnabledFor(logging.DEBUG):
                logger.debug("foreach: %s aligns itself: %s", self._layer_name(), self.why_not())
        return self.layer.align_filters() if filters is None else filters

    def find(self) -> PrealignedFilters | None:
        """Filters from a forward that runs on this thread, in the same backward if in one, the outermost first. None
        under torch.func, which needs decomposable ops."""
        if are_functorch_transforms_active():
            return None
        backward = current_graph_task_id()
        for forward in running.forwards:
            if forward.backward != backward or (prealigned := forward.prealigned_for(self)) is None:
                continue
            if reason := prealigned.why_not_for(self.layer):
                forward.warn_once(self.layer, reason)
                continue
            hook = saving_hook()
            if _is_checkpoint(hook, "_checkpoint_hook") and hook is not forward.hook:
                self.keep_for_recomputation(prealigned)
            forward.ready(prealigned.filters)
            return prealigned
        return None

    def why_not(self) -> str:
        """Why `find` returns None."""
        if are_functorch_transforms_active():
            return "a transform of torch.func is active"
        if not running.forwards:
            return "no forward of the model runs on this thread"
        forwards = [forward for forward in running.forwards if forward.backward == current_graph_task_id()]
        if not forwards:
            return "it runs in a backward, as reentrant checkpointing does"
        for forward in forwards:
            if (prealigned := forward.prealigned_for(self)) is not None:
                return prealigned.why_not_for(self.layer) or "unknown"
        return why_not_plain(self.layer) or "it is not part of the model whose forward runs"

    def _layer_name(self) -> str:
        of_this = [forward for forward in running.forwards if self in forward.sources]
        return repr(of_this[0].name_of(self.layer)) if of_this else f"a {type(self.layer).__name__}"

    def kept_filters(self) -> Tensor | None:
        """The filters for the second run of a checkpoint, if this is one."""
        if self.kept and _is_checkpoint(saving_hook(), "_recomputation_hook"):
            return next((kept.filters for kept in list(self.kept) if not kept.why_not_for(self.layer)), None)
        return None

    def keep_for_recomputation(self, prealigned: PrealignedFilters) -> None:
        if prealigned.filters.requires_grad and not prealigned.is_kept_for_recomputation:
            prealigned.is_kept_for_recomputation = True
            leaf = prealigned.filters.detach().requires_grad_()
            kept = PrealignedFilters(leaf, prealigned.made_from)
            self.kept.add(kept)
            prealigned.filters.register_hook(_Release(self.kept, kept))


def _is_checkpoint(hook: Any, name: str) -> bool:
    return hook is not None and getattr(hook, "__qualname__", "").startswith(name)


class _Release:
    """A hook of aligned filters; it lives as long as their graph."""

    def __init__(self, all_kept: set[PrealignedFilters], kept: PrealignedFilters) -> None:
        self.all_kept = all_kept
        self.kept = kept

    def __call__(self, _: Tensor) -> None:
        if not backward_keeps_graph():
            self.all_kept.discard(self.kept)

    def __del__(self) -> None:
        self.all_kept.discard(self.kept)
