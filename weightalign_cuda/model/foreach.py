"""All layers of a model aligned together: one launch when the first one is used, one launch in the backward."""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..functional.alignment import align_foreach, aligned_directly
from ..nn.layers import Aligned, aligned_layers
from ..ops.reusable import memory_of, which_are_free
from ..torch_private import (
    FrameAction,
    FrameExecStrategy,
    are_functorch_transforms_active,
    get_eval_frame_callback,
    set_code_exec_strategy,
)
from .fingerprint import fingerprint, has_plain_parameters, is_trained
from .foreach_source import ForeachSource
from .prealigned import AlignedLayers, ModelForward, logger, running
from .unsharded import check_unsharded

# For the error of `check_unsharded`.
UNSHARDED = (
    "foreach: all layers cannot be aligned at the start of the forward",
    "use convert(model, foreach=False), by which each layer aligns itself",
)


def switch(root: nn.Module, foreach: bool | int) -> None:
    """Turns foreach on for a model, with that many buckets, or off."""
    before: Foreach | None = root.__dict__.pop("_foreach", None)
    if before is not None:
        before.remove(root)
    if foreach:
        root._foreach = Foreach(root, int(foreach))  # type: ignore[assignment]
        for layer in aligned_layers(root.modules()):
            _join(layer)  # now, not during torch.compile's first trace


def switch_off_all(model: nn.Module) -> None:
    """Turns foreach off in the model and all its submodules, which may have been converted on their own."""
    for module in model.modules():
        switch(module, False)


class Foreach:
    """Two hooks of a model. They keep no reference to it, so that copies and pickles work."""

    def __init__(self, root: nn.Module, buckets: int) -> None:
        self.buckets = buckets
        self.handles = (
            root.register_forward_pre_hook(self.before, prepend=True),
            root.register_forward_hook(self.after, always_call=True),
        )

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles have memory of their own. (Another thread may set this one's meanwhile.)"""
        state = self.__dict__.copy()
        state.pop("memory", None)
        return state

    def remove(self, root: nn.Module) -> None:
        for handle in self.handles:
            handle.remove()
        for layer in aligned_layers(root.modules()):
            if isinstance(layer.aligned_by, ForeachSource):
                layer.aligned_by = None

    def before(self, root: nn.Module, _: Any) -> None:
        if torch.compiler.is_compiling():
            layers = [layer for layer in aligned_layers(root.modules()) if may_take_part(layer)]
            for layer, filters in zip(layers, self.filters_of(layers), strict=True):
                _join(layer)
                layer.aligned_by.traced.filters = filters  # type: ignore[union-attr]
        else:
            # torch.compile(root) traces only the forward; its hooks run here: see the comment below this class.
            self.start(root, get_eval_frame_callback() is not None)

    def after(self, root: nn.Module, *_: Any) -> None:
        if not torch.compiler.is_compiling():
            self.finish(root)
            return
        for layer in aligned_layers(root.modules()):
            if isinstance(layer.aligned_by, ForeachSource):
                layer.aligned_by.traced.filters = None

    def start(self, root: nn.Module, is_traced: bool) -> None:
        modules = all_modules(root)
        sources = [source for layer in aligned_layers(modules) if isinstance(source := _join(layer), ForeachSource)]
        forward = ModelForward(root, sources, lambda: self.align(sources), is_traced)
        running.forwards.append(forward)  # before anything can raise: `finish` is always called
        check_unsharded(modules, *UNSHARDED)
        if is_traced and not are_functorch_transforms_active():  # a compiled graph cannot call `find`
            for source in sources:
                if (prealigned := source.find()) is not None:
                    source.traced.filters = prealigned.filters

    def finish(self, root: nn.Module) -> None:
        forwards = running.forwards
        for i in reversed(range(len(forwards))):
            if forwards[i].root is root:
                for forward in forwards[i:]:
                    if forward.is_traced:
                        for source in forward.aligned or ():
                            source.traced.filters = None
                del forwards[i:]
                return

    def align(self, sources: Iterable[ForeachSource]) -> AlignedLayers:
        is_outermost = len(running.forwards) == 1  # else a model around this one may have aligned the layer
        made_from = {
            source: state
            for source in sources
            if (is_outermost or source.find() is None) and (state := fingerprint(source.layer))
        }
        memory = which_are_free(self.__dict__.pop("memory", ()))  # popped, as other threads may run the model, too
        filters = self.filters_of([source.layer for source in made_from], memory)
        self.memory = memory_of(filters)
        logger.debug("foreach: %d layers aligned together", len(filters))
        return dict(zip(made_from, zip(filters, made_from.values(), strict=True), strict=True))

    def filters_of(self, layers: list[Aligned], memory: Sequence[Tensor | None] = ()) -> list[Tensor]:
        """Of each layer, aligned in one launch for each bucket, in this memory where it fits."""
        found: list[Tensor] = []
        for bucket in buckets(layers, self.buckets):
            lists = [layer.filters() for layer in bucket], [layer._parameters["gain"] for layer in bucket]
            eps, scale = [layer.eps for layer in bucket], [layer.scale for layer in bucket]
            own = memory[len(found) : len(found) + len(bucket)] or None
            aligned = aligned_directly(*lists, eps, scale, None, torch.preserve_format, own)
            if aligned is None:
                aligned = align_foreach(*lists, eps=eps, scale=scale)
            if self.buckets > 1:
                _run_when_ready(aligned)
            found += aligned
        if torch.is_grad_enabled():  # a frozen layer's filters require grad if others' do
            pairs = zip(found, layers, strict=True)
            found = [t if is_trained(layer) or not t.requires_grad else t.detach() for t, layer in pairs]
        return found


# Hooks that torch.compile calls are not compiled themselves, as their effects depend on the thread; `before` checks
# whether torch.compile is active, which must hold in it, but not in what it calls. If torch.compile traces a call of
# the root inside another module, its hooks are part of the graph.
_SKIP, _LEAVE = FrameAction.SKIP, FrameAction.DEFAULT
for _function, _what_it_calls in (
    (Foreach.before, _LEAVE),
    (Foreach.after, _LEAVE),
    (Foreach.start, _SKIP),
    (Foreach.finish, _SKIP),
):
    set_code_exec_strategy(_function.__code__, FrameExecStrategy(_SKIP, _what_it_calls))


def all_modules(root: nn.Module) -> list[nn.Module]:
    """list(root.modules()), without the names that cost three quarters of its time."""
    found = {root: None}

    def visit(module: nn.Module) -> None:
        for child in module._modules.values():
            if child is not None and child not in found:
                found[child] = None
                if child._modules:
                    visit(child)

    visit(root)
    return list(found)


def _join(layer: Aligned) -> Any:
    """Sets the layer's source of filters, and returns it; an existing one (wa.frozen) is kept."""
    source = layer.aligned_by
    if source is None and has_plain_parameters(layer):
        source = layer.aligned_by = ForeachSource(layer)
    return source


def may_take_part(layer: Aligned) -> bool:
    return (layer.aligned_by is None or isinstance(layer.aligned_by, ForeachSource)) and has_plain_parameters(layer)


def buckets(layers: list[Aligned], count: int) -> list[list[Aligned]]:
    """At most `count` groups of consecutive layers, with about equally many weights."""
    if count == 1:
        return [layers] if layers else []
    sizes = [layer.weight.numel() for layer in layers]
    ends = list(itertools.accumulate(sizes))
    buckets: list[list[Aligned]] = [[] for _ in range(count)]
    for layer, size, end in zip(layers, sizes, ends, strict=True):
        middle = (end - size / 2) / max(ends[-1], 1)
        buckets[int(middle * count)].append(layer)
    return [bucket for bucket in buckets if bucket]


def _run_when_ready(aligned: Sequence[Tensor]) -> None:
    """Autograd runs higher sequence numbers first, and so would leave the buckets, created at the start, to the end.
    Raise theirs, so that each runs once it is ready."""
    for node in {t.grad_fn for t in aligned if t.grad_fn is not None}:
        node._set_sequence_nr(2**62)  # type: ignore[attr-defined]
