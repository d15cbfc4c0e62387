"""All layers of a model aligned together: one launch when the first one is used, one launch in the backward."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._dynamo import eval_frame

from ..functional.alignment import align_foreach
from ..nn.layers import Aligned, aligned_layers
from .prealigned import Forward, Together, is_trained, is_whole_parameter, running, state_of

_REASONS = {
    "FSDPModule": "FSDP2 gathers a layer's parameters only around that layer's own forward and backward",
    "FullyShardedDataParallel": "FSDP gathers a layer's parameters only around that layer's own forward and backward",
    "DataParallel": "torch.nn.DataParallel runs copies of the layers, on other threads and devices",
}


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
            if isinstance(layer.aligned_by, Together):
                layer.aligned_by = None

    def before(self, root: nn.Module, _: Any) -> None:
        if torch.compiler.is_compiling():
            for together, filters, _ in self.align(aligned_layers(root.modules())):
                together.traced.filters = filters
        else:
            # Of torch.compile(root) only the forward is traced, and its hooks run here; see the end of this class.
            self.start(root, eval_frame.get_eval_frame_callback() is not None)

    def after(self, root: nn.Module, *_: Any) -> None:
        if not torch.compiler.is_compiling():
            self.finish(root)
            return
        for layer in aligned_layers(root.modules()):
            if isinstance(layer.aligned_by, Together):
                layer.aligned_by.traced.filters = None

    def start(self, root: nn.Module, is_traced: bool) -> None:
        modules = list(root.modules())
        layers = aligned_layers(modules)
        forward = Forward(root, layers, lambda: self.align(layers), is_traced)
        running.forwards.append(forward)  # before anything can raise: `finish` is called always
        check_whole(modules)
        if torch._C._are_functorch_transforms_active():
            return
        for layer in layers:
            _join(layer)
            # A graph cannot ask.
            if is_traced and isinstance(layer.aligned_by, Together) and (held := layer.aligned_by.held()) is not None:
                layer.aligned_by.traced.filters = held.filters

    def finish(self, root: nn.Module) -> None:
        forwards = running.forwards
        for i in reversed(range(len(forwards))):
            if forwards[i].root is root:
                for forward in forwards[i:]:
                    if forward.is_traced:
                        for together in forward.held or ():
                            together.traced.filters = None
                del forwards[i:]
                return

    def align(self, layers: Sequence[Aligned]) -> list[tuple[Any, Tensor, Any]]:
        """Of each layer that takes part, who gives it its filters, these, and what they were made from."""
        layers = [layer for layer in layers if _takes_part(layer)]
        results: list[tuple[Any, Tensor, Any]] = []
        for bucket in _buckets(layers, self.buckets):
            states = [None if torch.compiler.is_compiling() else state_of(layer) for layer in bucket]
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
        return results


# Where torch.compile calls a hook, it is not compiled by itself, for what it leaves behind would depend on the thread;
# `before` asks whether anything is compiled, which must be true in it, but not in what it calls. Where torch.compile
# traces a call of the root inside another module, hooks and all, these are part of the graph.
# (torch.compiler.disable would do, were it not for its import of all of torch._dynamo: 1.5 s.)
_SKIP, _LEAVE = eval_frame._FrameAction.SKIP, eval_frame._FrameAction.DEFAULT
for _function, _what_it_calls in (
    (Foreach.before, _LEAVE),
    (Foreach.after, _LEAVE),
    (Foreach.start, _SKIP),
    (Foreach.finish, _SKIP),
):
    eval_frame.set_code_exec_strategy(_function.__code__, eval_frame._FrameExecStrategy(_SKIP, _what_it_calls))


def check_whole(
    modules: Sequence[nn.Module],
    what: str = "foreach: all layers cannot be aligned at the start of the forward",
    instead: str = "use convert(model, foreach=False), by which each layer aligns itself",
) -> None:
    """A model (all of its modules, itself first) that has all its parameters at once, each layer being one.

    Raises:
        RuntimeError: saying why not.
    """
    reason = _REASONS["DataParallel"] if "_is_replica" in modules[0].__dict__ else None
    for kind in set(map(type, modules)):
        reason = reason or _reason(kind)
    if reason:
        raise RuntimeError(f"{what}, as {reason}; {instead}")


@functools.cache
def _reason(kind: type) -> str | None:
    return next((_REASONS[c.__name__] for c in kind.__mro__ if c.__name__ in _REASONS), None)


def _join(layer: Aligned) -> None:
    """Whatever else gives a layer its filters (wa.frozen) goes on doing so."""
    if layer.aligned_by is None and is_whole_parameter(layer):
        layer.aligned_by = Together(layer)


def _takes_part(layer: Aligned) -> bool:
    """Unless a model around this one has aligned it."""
    _join(layer)
    together = layer.aligned_by
    if not (isinstance(together, Together) and is_whole_parameter(layer)):
        return False
    return torch.compiler.is_compiling() or len(running.forwards) == 1 or together.held() is None


def _buckets(layers: list[Aligned], count: int) -> list[list[Aligned]]:
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
