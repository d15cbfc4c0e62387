"""All layers of a model aligned together: one launch at the start of its forward, one launch in its backward."""

import functools
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._dynamo import eval_frame
from torch._dynamo.decorators import skip_code  # type: ignore[attr-defined]

from ._checks import result_dtype
from .functional import align_foreach
from .layers import Aligned

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
        for layer in root.modules():
            if isinstance(layer, Aligned):
                _takes_part(layer)  # now, not in the midst of torch.compile's first trace


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
        for layer in root.modules():
            if isinstance(layer, Aligned) and isinstance(layer.aligned_by, _Together):
                layer.aligned_by = None

    def before(self, root: nn.Module, _: Any) -> None:
        if torch.compiler.is_compiling():
            for together, filters, _ in self.align(root):
                together.traced.filters = filters
        else:
            # Of torch.compile(root) only the forward is traced, and its hooks run here; see `skip_code` below.
            self.start(root, eval_frame.get_eval_frame_callback() is not None)

    def after(self, root: nn.Module, *_: Any) -> None:
        if not torch.compiler.is_compiling():
            self.finish(root)
            return
        for layer in root.modules():
            if isinstance(layer, Aligned) and isinstance(layer.aligned_by, _Together):
                layer.aligned_by.traced.filters = None

    @torch.compiler.disable
    def start(self, root: nn.Module, is_traced: bool) -> None:
        check_whole(root)
        forward = _Forward(root)
        _running.forwards.append(forward)  # before anything can raise: `finish` is called always
        if torch._C._are_functorch_transforms_active():
            return  # these see each layer's formula in PyTorch's own operations, which no launch can join
        for together, filters, state in self.align(root):
            forward.held[together] = _Held(filters, state)
            if is_traced:
                together.traced.filters = filters

    @torch.compiler.disable
    def finish(self, root: nn.Module) -> None:
        forwards = _running.forwards
        for i in reversed(range(len(forwards))):
            if forwards[i].root is root:
                for forward in forwards[i:]:
                    for together in forward.held:
                        together.traced.filters = None
                del forwards[i:]
                return

    def align(self, root: nn.Module) -> list[tuple[Any, Tensor, Any]]:
        """Of each layer that takes part, who gives it its filters, these, and what they were made from."""
        layers = [layer for layer in root.modules() if isinstance(layer, Aligned) and _takes_part(layer)]
        results: list[tuple[Any, Tensor, Any]] = []
        for bucket in _buckets(layers, self.buckets):
            states = [None if torch.compiler.is_compiling() else state_of(layer) for layer in bucket]
            aligned = align_foreach(
                [layer.filters() for layer in bucket],
                [layer.gain for layer in bucket],
                eps=[layer.eps for layer in bucket],
                scale=[layer.scale for layer in bucket],
            )
            if self.buckets > 1:
                _run_when_ready(aligned)
            # A frozen layer's filters would want gradients because others' do.
            filters = [t if is_trained(layer) else t.detach() for layer, t in zip(bucket, aligned, strict=True)]
            results += zip([layer.aligned_by for layer in bucket], filters, states, strict=True)
        return results


# Where torch.compile calls a hook, it is not compiled by itself, for what it leaves behind would depend on the thread.
# Where torch.compile traces a call of the root inside another module, hooks and all, these are part of the graph.
for _hook in (Foreach.before, Foreach.after):
    skip_code(_hook.__code__)


def check_whole(
    root: nn.Module,
    what: str = "foreach: all layers cannot be aligned at the start of the forward",
    instead: str = "use convert(model, foreach=False), by which each layer aligns itself",
) -> None:
    """A model that has all its parameters at once, each layer being one.

    Raises:
        RuntimeError: saying why not.
    """
    reason = _REASONS["DataParallel"] if "_is_replica" in root.__dict__ else None
    for kind in {type(module) for module in root.modules()}:
        reason = reason or _reason(kind)  # type: ignore[arg-type]
    if reason:
        raise RuntimeError(f"{what}, as {reason}; {instead}")


@functools.cache
def _reason(kind: type) -> str | None:
    return next((_REASONS[c.__name__] for c in kind.__mro__ if c.__name__ in _REASONS), None)


def is_whole_parameter(layer: Aligned) -> bool:
    """Not a weight or gain that something makes at each use (parametrizations, pruning), nor an inference tensor, whose
    changes torch does not count."""
    weight, gain = layer._parameters.get("weight"), layer._parameters.get("gain")
    if weight is None or (gain is None and layer.gain is not None):
        return False
    return torch.compiler.is_compiling() or not (weight.is_inference() or (gain is not None and gain.is_inference()))


def _takes_part(layer: Aligned) -> bool:
    """Whatever else gives a layer its filters (wa.frozen) goes on doing so."""
    if not is_whole_parameter(layer):
        return False
    if layer.aligned_by is None:
        layer.aligned_by = _Together(layer)
    together = layer.aligned_by
    # Else a model around this one has aligned it.
    return isinstance(together, _Together) and (torch.compiler.is_compiling() or together.held() is None)


def _buckets(layers: Sequence[Aligned], count: int) -> list[list[Aligned]]:
    """At most `count` runs of layers, of about as many weights each."""
    buckets: list[list[Aligned]] = [[] for _ in range(count)]
    total, done = sum(layer.weight.numel() for layer in layers), 0
    for layer in layers:
        middle = done + layer.weight.numel() / 2
        buckets[min(int(middle / total * count), count - 1) if total else 0].append(layer)
        done += layer.weight.numel()
    return [bucket for bucket in buckets if bucket]


def _run_when_ready(aligned: Sequence[Tensor]) -> None:
    """The backward runs what was made last first, which would leave all buckets, made at the start, to the end."""
    for node in {t.grad_fn for t in aligned if t.grad_fn is not None}:
        node._set_sequence_nr(2**62)  # type: ignore[attr-defined]


def is_trained(layer: Aligned) -> bool:
    return layer.weight.requires_grad or (layer.gain is not None and layer.gain.requires_grad)


def state_of(layer: Aligned) -> tuple[Any, ...]:
    """What the filters are made from; they are right as long as it is the same."""
    weight, gain = layer.weight, layer.gain
    of_gain = () if gain is None else (id(gain), gain._version, gain.data_ptr(), gain.requires_grad)
    of_weight = id(weight), weight._version, weight.data_ptr(), weight.requires_grad
    return *of_weight, *of_gain, layer.eps, layer.scale


class _Held:
    """Aligned filters of one layer."""

    def __init__(self, filters: Tensor, state: tuple[Any, ...]) -> None:
        self.filters = filters
        self.state = state
        self.is_kept = False

    def is_right(self, layer: Aligned) -> bool:
        weight, filters = layer.weight, self.filters
        return (
            self.state == state_of(layer)
            and filters.dtype is result_dtype("weight", weight, weight.device.type, None)
            and (filters.requires_grad or not torch.is_grad_enabled() or not is_trained(layer))
        )


class _Forward:
    """A forward of a root that runs on this thread. A backward may run inside it, and a forward inside that."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.backward = torch._C._current_graph_task_id()
        self.hook = _saving_hook()
        self.held: dict[_Together, _Held] = {}


class _Running(threading.local):
    def __init__(self) -> None:
        self.forwards: list[_Forward] = []


class _Traced(threading.local):
    """The same for one layer in forwards that torch.compile traced, which can look at little else: whether a weight
    changes in their midst, it cannot."""

    def __init__(self) -> None:
        self.filters: Tensor | None = None


_running = _Running()


def _saving_hook() -> Any:
    """What torch calls now on each tensor saved for the backward."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return None if hooks is None else hooks[0]


def _is_checkpoint(hook: Any, name: str) -> bool:
    return hook is not None and getattr(hook, "__qualname__", "").startswith(name)


class _Together:
    """Gives one layer its filters: those that a forward of the whole model holds, if they are right; else the layer
    aligns itself.

    Activation checkpointing (the kind that is not reentrant) runs a layer again in the backward, to save the same
    tensors again; the graph of that run is dropped. So it gets the same filters, as a leaf. They are kept until their
    gradient is there or their graph is gone. In the reentrant kind gradients go through the second run, where the layer
    aligns itself.
    """

    def __init__(self, layer: Aligned) -> None:
        self.layer = layer
        self.kept: set[_Held] = set()
        self.traced = _Traced()

    def __call__(self) -> Tensor:
        if torch.compiler.is_compiling():
            filters = self.traced.filters
        else:
            held = self.held()
            filters = self.kept_filters() if held is None else held.filters
        return self.layer.align_filters() if filters is None else filters

    def held(self) -> _Held | None:
        """By a forward that runs here, in the same backward if it is in one."""
        backward = torch._C._current_graph_task_id()
        for forward in reversed(_running.forwards):
            held = forward.held.get(self)
            if held is not None and forward.backward == backward and held.is_right(self.layer):
                hook = _saving_hook()
                if _is_checkpoint(hook, "_checkpoint_hook") and hook is not forward.hook:
                    self.keep(held)
                return held
        return None

    def kept_filters(self) -> Tensor | None:
        if self.kept and _is_checkpoint(_saving_hook(), "_recomputation_hook"):
            return next((kept.filters for kept in list(self.kept) if kept.is_right(self.layer)), None)
        return None

    def keep(self, held: _Held) -> None:
        if held.filters.requires_grad and not held.is_kept:
            held.is_kept = True
            kept = _Held(held.filters.detach().requires_grad_(), held.state)
            self.kept.add(kept)
            held.filters.register_hook(_Release(self.kept, kept))


class _Release:
    """A hook of aligned filters, alive as long as their graph is."""

    def __init__(self, all_kept: set[_Held], kept: _Held) -> None:
        self.all_kept = all_kept
        self.kept = kept

    def __call__(self, _: Tensor) -> None:
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            self.all_kept.discard(self.kept)

    def __del__(self) -> None:
        self.all_kept.discard(self.kept)
