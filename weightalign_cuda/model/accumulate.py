"""Gradient accumulation: weights aligned once for any number of micro-batches, with one backward launch at the end."""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..functional.checks import check_module, result_dtype
from ..nn.layers import Aligned, aligned_by, aligned_layers
from ..torch_private import are_functorch_transforms_active
from .fingerprint import fingerprint, has_plain_parameters, is_trained
from .joint_alignment import JointAlignment
from .streams import ReadyEvent, is_captured
from .unsharded import check_unsharded


@contextlib.contextmanager
def accumulate(model: nn.Module) -> Iterator[nn.Module]:
    """Context for the micro-batches, forward and backward, of one optimizer step.

    All layers are aligned in one launch, when the first one is used. The gradients of the aligned weights (arXiv
    2010.07160, eq. 10) are summed in float32 (float64 for float64 weights); on exit one launch turns the sums into the
    gradients of weights and gains, which are added to `.grad` as by a backward. The result equals plain accumulation,
    up to rounding. Aligned weights and sums take memory until exit.

        with wa.accumulate(model):
            for images, labels in micro_batches:
                loss(model(images), labels).backward()
        optimizer.step()

    Weights and gains get their gradients only on exit: zero them before; unscale, clip and step afterwards. After an
    exception they get none. Works with and without `convert(model, foreach=True)`, under autocast, with checkpointing.
    Inside torch.compile nothing is kept: the graph aligns, and its gradients go to `.grad` immediately; likewise for
    layers whose weight is computed by a parametrization or pruning. DistributedDataParallel: pass the wrapped model,
    and run all micro-batches but the last under its `no_sync()`; on exit all gradients have been averaged.

    Args:
        model: any module.

    Yields:
        The model.

    Raises:
        TypeError: if the model is not a torch.nn.Module.
        RuntimeError: if an optimizer of the model steps inside (raised by the step); if parameters change otherwise (at
            their next use or on exit); if a CUDA graph captures only a part of the context; for models sharded by FSDP
            or containing torch.nn.DataParallel; if not exactly the last micro-batch of DistributedDataParallel
            synchronises, and for its options find_unused_parameters and static_graph, which would count weights and
            gains as unused.
    """
    check_module(model)
    check_unsharded(
        list(model.modules()),
        "wa.accumulate: the layers cannot be aligned for all micro-batches",
        "accumulate without it; under FSDP2 by set_requires_gradient_sync(False), all micro-batches but the last",
    )
    layers = [layer for layer in aligned_layers(model.modules()) if has_plain_parameters(layer)]
    shared = _Accumulation(model, layers)
    functions = {layer: _Accumulated(shared, layer) for layer in layers}
    with _without_steps(model), _with_one_synchronisation(model), aligned_by(functions):
        yield model
    shared.deliver()


@contextlib.contextmanager
def _without_steps(model: nn.Module) -> Iterator[None]:
    own = set(model.parameters())

    def refuse(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if any(p in own for group in optimizer.param_groups for p in group["params"]):
            raise RuntimeError(
                "optimizer step inside wa.accumulate: weights and gains get their gradients at its end; step after it"
            )

    handle = register_optimizer_step_pre_hook(refuse)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _with_one_synchronisation(model: nn.Module) -> Iterator[None]:
    """After a forward outside of no_sync(), DistributedDataParallel waits for the gradient of each parameter. Those
    added on exit are the last of that forward, provided that no other forward follows it."""
    wrappers = [module for module in model.modules() if isinstance(module, DistributedDataParallel)]
    for wrapper in wrappers:
        if wrapper.find_unused_parameters or wrapper.static_graph:
            raise RuntimeError(
                "wa.accumulate: DistributedDataParallel with find_unused_parameters or static_graph would count the "
                "weights as unused, as their gradients come at the end; switch these off, or accumulate without it"
            )
    rule = "wa.accumulate: under DistributedDataParallel all micro-batches but the last belong under its no_sync()"
    forwards: list[bool] = []  # whether each synchronises

    def count(wrapper: DistributedDataParallel, _: Any) -> None:
        if torch.is_grad_enabled():
            if any(forwards):
                raise RuntimeError(f"{rule}; got another one after one that synchronises")
            forwards.append(wrapper.require_backward_grad_sync)

    handles = [wrapper.register_forward_pre_hook(count) for wrapper in wrappers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    if forwards and not any(forwards):
        raise RuntimeError(f"{rule}; got none that synchronises, so gradients would differ between the processes")


class _Accumulation:
    """The layers of one model, aligned together: once for each device, weight dtype and autocast dtype."""

    def __init__(self, model: nn.Module, layers: Sequence[Aligned]) -> None:
        self.layers = layers
        self.versions = {name: (p, p._version) for name, p in model.named_parameters() if not p.is_inference()}
        self.made_from = {layer: fingerprint(layer) for layer in layers}
        self.groups: dict[Any, _Group] = {}
        self.lock = threading.Lock()

    def filters(self, layer: Aligned) -> Tensor:
        if self.made_from[layer] != fingerprint(layer):
            raise self.changed()
        device, own = layer.weight.device, layer.weight.dtype
        key = device, own, result_dtype("weight", layer.weight, device.type, None)
        with self.lock:
            if key not in self.groups:
                alike = [each for each in self.layers if (each.weight.device, each.weight.dtype) == (device, own)]
                self.groups[key] = _Group(alike, key[-1])
        return self.groups[key].filters_of(layer)

    def changed(self) -> RuntimeError:
        names = [name for name, (p, version) in self.versions.items() if p._version != version]
        return RuntimeError(
            "wa.accumulate: parameters changed inside (an optimizer step?), but the sums belong to the old ones; "
            f"change them after it; got {', '.join(names[:3]) or 'a weight or gain replaced or frozen'}"
        )

    def deliver(self) -> None:
        """Runs through autograd, so that all hooks of the parameters run, once."""
        is_kept = all(p._version == version for p, version in self.versions.values())
        if not is_kept or any(self.made_from[layer] != fingerprint(layer) for layer in self.layers):
            raise self.changed()
        found = [pair for group in self.groups.values() for pair in group.gradients()]
        if found:
            roots, grads = zip(*found, strict=True)
            torch.autograd.backward(roots, grads)


class _Accumulated:
    """Provides one layer's filters."""

    name = "accumulate"

    def __init__(self, shared: _Accumulation, layer: Aligned) -> None:
        self.shared = shared
        self.layer = layer

    def __call__(self) -> Tensor:
        if torch.compiler.is_compiling() or are_functorch_transforms_active():
            return self.layer.align_filters()
        return self.shared.filters(self.layer)


class _Sum:
    """A sum of gradients, in at least float32: half precision would lose small ones."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.value: Tensor | None = None
        self.ready: ReadyEvent
        self.lock = threading.Lock()

    @torch.no_grad()
    def add(self, grad: Tensor) -> None:
        with self.lock:
            value = self.get()
            self.value = grad.to(self.dtype, copy=True) if value is None else value.add_(grad)
            self.ready = ReadyEvent(grad.device)

    def get(self) -> Tensor | None:
        if self.value is not None:
            self.ready.wait(self.value)
        return self.value


class _Summed(torch.autograd.Function):
    """Identity whose backward adds the gradient to a sum and stops there. A leaf's `.grad` would not do: it has the
    leaf's dtype and is shared by threads."""

    @staticmethod
    def forward(ctx: Any, filters: Tensor, total: _Sum, _: Tensor) -> Tensor:
        """The last argument requires a gradient, so that the result does."""
        ctx.total = total
        return filters.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        ctx.total.add(grad)
        return None, None, None


class _Group:
    """Layers of one device and dtype: one op call forward and one backward."""

    def __init__(self, layers: Sequence[Aligned], dtype: torch.dtype) -> None:
        self.layers = layers
        self.is_captured = is_captured(layers[0].weight)
        with torch.inference_mode(False), torch.no_grad():
            weights, gains = [layer.filters() for layer in layers], [layer.gain for layer in layers]
        numbers = [layer.eps for layer in layers], [layer.scale for layer in layers]
        self.alignment = JointAlignment(weights, gains, *numbers, dtype)
        self.sums = [_Sum(self.alignment.statistics.dtype) for _ in layers]
        with torch.inference_mode(False), torch.enable_grad():
            dummy = torch.empty(0, device=layers[0].weight.device, requires_grad=True)
            triples = zip(layers, self.alignment.filters, self.sums, strict=True)
            self.filters = {x: _Summed.apply(t, total, dummy) if is_trained(x) else t for x, t, total in triples}

    def filters_of(self, layer: Aligned) -> Tensor:
        if is_captured(layer.weight) is not self.is_captured:
            raise RuntimeError(
                "wa.accumulate: a CUDA graph captured around some of its micro-batches would read filters, and write "
                "sums, of this one time at each replay; capture all of the context, or none of it"
            )
        filters = self.filters[layer]
        self.alignment.ready.wait(filters)
        return filters

    def gradients(self) -> list[tuple[Tensor, Tensor]]:
        """Weights and gains, as tensors of the autograd graph, and their gradients."""
        placed = self.alignment.gradients([total.get() for total in self.sums])
        with torch.enable_grad():
            targets = *(layer.filters() for layer in self.layers), *(layer.gain for layer in self.layers)
        pairs = zip(targets, placed, strict=True)
        return [(t, g) for t, g in pairs if t is not None and g is not None and t.requires_grad]
