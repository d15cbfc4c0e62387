"""All layers of a model aligned together: one launch when the first one is used, one launch in the backward."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..functional.alignment import align_foreach
from ..nn.layers import Aligned, aligned_layers
from ..torch_private import (
    FrameAction,
    FrameExecStrategy,
    are_functorch_transforms_active,
    get_eval_frame_callback,
    set_code_exec_strategy,
)
from .fingerprint import fingerprint, has_plain_parameters, is_trained
from .foreach_source import ForeachSource
from .prealigned import ModelForward, logger, running
from .unsharded import check_unsharded

# For the error of `check_unsharded`.
UNSHARDED = (
    "foreach: all layers cannot be aligned at the start of the forward",
    "use convert(model, foreach=False), by which each layer aligns itself",
)


def switch(root: nn.Module, foreach: bool | int) -> None:
    """Puts foreach on a model, in that many buckets, or takes it off."""
    before: Foreach | None = root.__dict__.pop("_foreach", None)
    if before is not None:
        before.remove(root)
    if foreach:
        root._foreach = Foreach(root, int(foreach))  # type: ignore[assignment]
        for layer in aligned_layers(root.modules()):
            _join(layer)  # now, not in the midst of torch.compile's first trace


def switch_off_all(model: nn.Module) -> None:
    """In the model and all its parts, which may have been models of their own."""
    for module in model.modules():
        switch(module, False)


class Foreach:
    """Two hooks of a model. They hold nothing of it, so that its copies and pickles have theirs."""

    def __init__(self, root: nn.Module, buckets: int) -> None:
        self.buckets = buckets
        self.handles = (
            root.register_forward_pre_hook(self.before, prepend=True),
            root.register_forward_hook(self.after, always_call=True),
        )

    def remove(self, root: nn.Module) -> None:
        for handle in self.handles:
            handle.remove()
        for layer in aligned_layers(root.modules()):
            if isinstance(layer.aligned_by, ForeachSource):
                layer.aligned_by = None

    def before(self, root: nn.Module, _: Any) -> None:
        if torch.compiler.is_compiling():
            for source, filters, _ in self.align(aligned_layers(root.modules())):
                source.traced.filters = filters
        else:
            # Of torch.compile(root) only the forward is traced, and its hooks run here; see the end of this class.
            self.start(root, get_eval_frame_callback() is not None)

    def after(self, root: nn.Module, *_: Any) -> None:
        if not torch.compiler.is_compiling():
            self.finish(root)
            return
        for layer in aligned_layers(root.modules()):
            if isinstance(layer.aligned_by, ForeachSource):
                layer.aligned_by.traced.filters = None

    def start(self, root: nn.Module, is_traced: bool) -> None:
        modules = list(root.modules())
        layers = aligned_layers(modules)
        forward = ModelForward(root, layers, lambda: self.align(layers), is_traced)
        running.forwards.append(forward)  # before anything can raise: `finish` is called always
        check_unsharded(modules, *UNSHARDED)
        if are_functorch_transforms_active():
            return
        for layer in layers:
            _join(layer)
            # A graph cannot ask.
            if (
                is_traced
                and isinstance(layer.aligned_by, ForeachSource)
                and (prealigned := layer.aligned_by.find()) is not None
            ):
                layer.aligned_by.traced.filters = prealigned.filters

    def finish(self, root: nn.Module) -> None:
        forwards = running.forwards
        for i in reversed(range(len(forwards))):
            if forwards[i].root is root:
                for forward in forwards[i:]:
                    if forward.is_traced:
                        for source in forward.prealigned or ():
                            source.traced.filters = None
                del forwards[i:]
                return

    def align(self, layers: Sequence[Aligned]) -> list[tuple[Any, Tensor, Any]]:
        """Of each layer that takes part, who gives it its filters, these, and what they were made from."""
        layers = [layer for layer in layers if _takes_part(layer)]
        results: list[tuple[Any, Tensor, Any]] = []
        for bucket in buckets(layers, self.buckets):
            states = [None if torch.compiler.is_compiling() else fingerprint(layer) for layer in bucket]
            aligned = align_foreach(
                [layer.filters() for layer in bucket],
                [layer._parameters["gain"] for layer in bucket],
                eps=[layer.eps for layer in bucket],
                scale=[layer.scale for layer in bucket],
            )
            if self.buckets > 1:
                _run_when_ready(aligned)
            for layer, filters, state in zip(bucket, aligned, states, strict=True):
                # A frozen layer's filters would want gradients because others' do.
                is_wanted = is_trained(layer) or not filters.requires_grad
                results.append((layer.aligned_by, filters if is_wanted else filters.detach(), state))
        if not torch.compiler.is_compiling():
            logger.debug("foreach: %d layers aligned together", len(layers))
        return results


# Where torch.compile calls a hook, it is not compiled by itself, for what it leaves behind would depend on the thread;
# `before` asks whether anything is compiled, which must be true in it, but not in what it calls. Where torch.compile
# traces a call of the root inside another module, hooks and all, these are part of the graph.
_SKIP, _LEAVE = FrameAction.SKIP, FrameAction.DEFAULT
for _function, _what_it_calls in (
    (Foreach.before, _LEAVE),
    (Foreach.after, _LEAVE),
    (Foreach.start, _SKIP),
    (Foreach.finish, _SKIP),
):
    set_code_exec_strategy(_function.__code__, FrameExecStrategy(_SKIP, _what_it_calls))


def _join(layer: Aligned) -> None:
    """Whatever else gives a layer its filters (wa.frozen) goes on doing so."""
    if layer.aligned_by is None and has_plain_parameters(layer):
        layer.aligned_by = ForeachSource(layer)


def _takes_part(layer: Aligned) -> bool:
    """Unless a model around this one has aligned it."""
    _join(layer)
    source = layer.aligned_by
    if not (isinstance(source, ForeachSource) and has_plain_parameters(layer)):
        return False
    return torch.compiler.is_compiling() or len(running.forwards) == 1 or source.find() is None


def buckets(layers: list[Aligned], count: int) -> list[list[Aligned]]:
    """At most `count` runs of layers, of about as many weights each."""
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
    """The backward runs what was made last first, which would leave all buckets, made at the start, to the end."""
    for node in {t.grad_fn for t in aligned if t.grad_fn is not None}:
        node._set_sequence_nr(2**62)  # type: ignore[attr-defined]
