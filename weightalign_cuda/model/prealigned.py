"""Aligned filters that outlive the alignment: what they must fulfil to be used, and who gives them to a layer, in a
forward of the whole model and when its backward runs the layer again."""

import contextlib
import logging
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.compiler import is_compiling

from ..functional.checks import PLAIN, autocast_dtype, device_type, result_dtype
from ..nn.layers import Aligned
from .streams import Made

logger = logging.getLogger("weightalign_cuda")
# Of each layer that takes part: who gives it its filters, these, and what they were made from.
AlignAll = Callable[[], Iterable[tuple["Together", Tensor, tuple[Any, ...]]]]


def is_whole_parameter(layer: Aligned) -> bool:
    """Not a weight or gain that something makes at each use (parametrizations, pruning), nor one of another class than
    torch's own, nor an inference tensor, whose changes torch does not count."""
    if "weight" not in layer._parameters or "gain" not in layer._parameters:
        return False
    if is_compiling():
        return True
    weight, gain = layer._parameters["weight"], layer._parameters["gain"]
    are_plain = type(weight) in PLAIN and type(gain) in PLAIN
    return are_plain and not weight.is_inference() and (gain is None or not gain.is_inference())  # type: ignore[union-attr]


def is_trained(layer: Aligned) -> bool:
    weight, gain = layer._parameters["weight"], layer._parameters["gain"]
    return weight.requires_grad or (gain is not None and gain.requires_grad)  # type: ignore[union-attr]


def state_of(layer: Aligned) -> tuple[Any, ...]:
    """What the filters are made from; they are right as long as it is the same."""
    parameters = layer._parameters
    weight, gain = parameters.get("weight"), parameters.get("gain")
    if weight is None:  # parametrized meanwhile
        return ()
    return state_with(layer, weight, gain)


def state_with(layer: Aligned, w: Tensor, g: Tensor | None) -> tuple[Any, ...]:
    """The same of a layer whose weight and gain are these, which something may make at each use."""
    own = id(w), w._version, w.data_ptr(), w.stride(), w.dtype, w.requires_grad, layer.eps, layer.scale
    return own if g is None else (*own, id(g), g._version, g.data_ptr(), g.stride(), g.dtype, g.requires_grad)


class Held:
    """Aligned filters of one layer."""

    def __init__(self, filters: Tensor, state: tuple[Any, ...], made: Made) -> None:
        self.filters = filters
        self.state = state
        self.made = made
        self.is_kept = False

    def what_is_wrong(self, layer: Aligned) -> str | None:
        """Why the layer cannot use them now."""
        if self.state != state_of(layer):
            return "its weight, gain, eps or scale has changed since"
        filters = self.filters
        if torch.is_grad_enabled() and not filters.requires_grad and is_trained(layer):
            return "it is to be trained, but the forward of the model began without gradients"
        if filters.is_inference() and not torch.is_inference_mode_enabled():
            return "it is outside of the inference mode in which the forward of the model began"
        asked = result_dtype("weight", layer.weight, device_type(filters), None)
        if filters.dtype is not asked:
            return f"autocast asks for {asked} here, and asked for {filters.dtype} when the filters were aligned"
        return None


class Forward:
    """A forward of a root that runs on this thread. A backward may run inside it, and a forward inside that.

    The layers are aligned when the first one asks, since the dtype may be that of an autocast which the forward enters;
    but otherwise as if at its start: in its grad mode, and without the hooks of a checkpoint inside, which would run
    the alignment again with a part of the model.
    """

    def __init__(self, root: nn.Module, layers: Iterable[Aligned], align: AlignAll, is_traced: bool) -> None:
        self.root = root
        self.is_traced = is_traced
        self.layers = set(layers)
        self.align = align
        self.backward = torch._C._current_graph_task_id()
        self.hook = _saving_hook()
        self.is_inference, self.wants_gradients = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        self.held: dict[Together, Held] | None = None
        self.device_type: str | None = None  # of all filters
        self.autocast_dtype: torch.dtype | None = None  # when they were made

    def held_for(self, together: "Together") -> Held | None:
        if together.layer not in self.layers:
            return None
        if self.held is None:
            with (
                torch.inference_mode(self.is_inference),
                torch.set_grad_enabled(self.wants_gradients),
                contextlib.nullcontext() if _saving_hook() is self.hook else saved_tensors_hooks(_as_is, _as_is),
            ):
                self.held, made = {}, {}  # `align` asks whether the filters are there already
                for each, filters, state in list(self.align()):
                    if filters.device not in made:
                        made[filters.device] = Made(filters.device)
                    self.held[each] = Held(filters, state, made[filters.device])
            if len(types := {device.type for device in made}) == 1:
                self.device_type = types.pop()
                self.autocast_dtype = autocast_dtype(self.device_type)
        return self.held.get(together)

    def filters_at_once(self, together: "Together") -> Tensor | None:
        """Those of a layer that has not changed, where nothing else has since the start: what `Together.held` finds,
        sooner."""
        if (
            self.device_type is None
            or (held := self.held.get(together)) is None  # type: ignore[union-attr]
            or (torch.is_grad_enabled() and not self.wants_gradients)
            or (self.is_inference and not torch.is_inference_mode_enabled())
            or torch._C._current_graph_task_id() != self.backward
            or torch._C._are_functorch_transforms_active()
            or _saving_hook() is not self.hook
            or autocast_dtype(self.device_type) is not self.autocast_dtype
            or held.state != state_of(together.layer)
        ):
            return None
        held.made.wait(held.filters)
        return held.filters

    def tell(self, layer: Aligned, reason: str) -> None:
        """Once for a model."""
        if self.root not in _told:
            _told.add(self.root)
            name = next(name for name, module in self.root.named_modules() if module is layer)
            logger.warning("foreach: %r, and others perhaps, is aligned in a launch of its own: %s", name, reason)


_told: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def _as_is(t: Tensor) -> Tensor:
    return t


class _Running(threading.local):
    def __init__(self) -> None:
        self.forwards: list[Forward] = []


class _Traced(threading.local):
    """The same for one layer in forwards that torch.compile traced, which can look at little else: whether a weight
    changes in their midst, it cannot."""

    def __init__(self) -> None:
        self.filters: Tensor | None = None


running = _Running()


def _saving_hook() -> Any:
    """What torch calls now on each tensor saved for the backward."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return None if hooks is None else hooks[0]


def _is_checkpoint(hook: Any, name: str) -> bool:
    return hook is not None and getattr(hook, "__qualname__", "").startswith(name)


class Together:
    """Gives one layer its filters: those that a forward of the whole model holds, if they are right; else the layer
    aligns itself.

    Activation checkpointing (the kind that is not reentrant) runs a layer again in the backward, to save the same
    tensors again; the graph of that run is dropped. So it gets the same filters, as a leaf. They are kept until their
    gradient is there or their graph is gone. In the reentrant kind gradients go through the second run, where the layer
    aligns itself.
    """

    def __init__(self, layer: Aligned) -> None:
        self.layer = layer
        self.kept: set[Held] = set()
        self.traced = _Traced()

    def __call__(self) -> Tensor:
        if is_compiling():
            filters = self.traced.filters
        else:
            forwards = running.forwards
            filters = forwards[0].filters_at_once(self) if forwards else None
            if filters is None:
                held = self.held()
                filters = self.kept_filters() if held is None else held.filters
        return self.layer.align_filters() if filters is None else filters

    def held(self) -> Held | None:
        """By a forward that runs here, the outermost one first, in the same backward if it is in one. (torch.func looks
        at each layer's formula in PyTorch's own operations, which no launch can join.)"""
        if torch._C._are_functorch_transforms_active():
            return None
        backward = torch._C._current_graph_task_id()
        for forward in running.forwards:
            if forward.backward != backward or (held := forward.held_for(self)) is None:
                continue
            if reason := held.what_is_wrong(self.layer):
                forward.tell(self.layer, reason)
                continue
            hook = _saving_hook()
            if _is_checkpoint(hook, "_checkpoint_hook") and hook is not forward.hook:
                self.keep(held)
            held.made.wait(held.filters)
            return held
        return None

    def kept_filters(self) -> Tensor | None:
        if self.kept and _is_checkpoint(_saving_hook(), "_recomputation_hook"):
            return next((kept.filters for kept in list(self.kept) if not kept.what_is_wrong(self.layer)), None)
        return None

    def keep(self, held: Held) -> None:
        if held.filters.requires_grad and not held.is_kept:
            held.is_kept = True
            kept = Held(held.filters.detach().requires_grad_(), held.state, held.made)
            self.kept.add(kept)
            held.filters.register_hook(_Release(self.kept, kept))


class _Release:
    """A hook of aligned filters, alive as long as their graph is."""

    def __init__(self, all_kept: set[Held], kept: Held) -> None:
        self.all_kept = all_kept
        self.kept = kept

    def __call__(self, _: Tensor) -> None:
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            self.all_kept.discard(self.kept)

    def __del__(self) -> None:
        self.all_kept.discard(self.kept)
