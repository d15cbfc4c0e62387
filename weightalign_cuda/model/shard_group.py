"""The layers that one call of `fully_shard` shards: each process aligns its own filters, all of them in one launch."""

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from ..functional.alignment import by_launch
from ..functional.dtensor import placed_as
from ..nn.layers import Aligned
from ..torch_private import queue_callback
from .fingerprint import is_trained
from .joint_alignment import JointAlignment
from .placeholder import Placeholder
from .streams import ReadyEvent


class Member(nn.Module):
    """One layer, and the parameter that FSDP2 manages for it. It is outside of the model, where nobody else sees it;
    weight and gain stay parameters of the layer, as DTensors.

    While FSDP2 has gathered it, `weight` is a plain tensor: the layer's aligned filters.
    """

    first_dtype: torch.dtype | None = None  # of the weight, when it was first gathered

    def __init__(self, layer: Aligned, device: torch.device, group: "ShardGroup") -> None:
        super().__init__()
        vars(self).update(layer=layer, group=group)  # the layer: not a submodule
        weight = layer.weight
        self.weight = nn.Parameter(Placeholder(weight.shape, weight.dtype, device), requires_grad=is_trained(layer))

    def __getattr__(self, name: str) -> Any:
        """FSDP2 looks its parameter up at the first forward, for a dtype changed since, as by `model.half()`."""
        value: Any = super().__getattr__(name)
        if name == "weight" and value.dtype is not self.layer.weight.dtype:
            value = nn.Parameter(value.detach().to(self.layer.weight.dtype), requires_grad=value.requires_grad)
            self.manage(value)
        return value

    def manage(self, parameter: nn.Parameter) -> None:
        """Listens to the gradients of the filters that FSDP2 has reduced."""
        requires_grad, parameter.requires_grad = parameter.requires_grad, True  # only then a hook is taken
        take = weakref.WeakMethod(self._take_gradient)  # the garbage collector does not look into a parameter's hooks
        parameter.register_post_accumulate_grad_hook(lambda managed: take()(managed))  # type: ignore[misc]
        parameter.requires_grad = requires_grad
        self._parameters["weight"] = parameter

    def _take_gradient(self, managed: Tensor) -> None:
        grad, managed.grad = managed.grad, None
        self.group.take(self, grad.to_local())  # type: ignore[union-attr]

    @property
    def managed(self) -> Any:
        return self._parameters["weight"]

    def is_sharded(self) -> bool:
        return hasattr(self.managed, "placements")

    def sources(self) -> tuple[Any, Any]:
        """Weight and gain, which may be None: DTensors."""
        return self.layer._parameters["weight"], self.layer._parameters["gain"]

    def version(self) -> tuple[int, ...]:
        return tuple(number for t in self.sources() if t is not None for number in (id(t), t._version))


class ShardGroup:
    """What FSDP2 gathers in one message. The order of a step: `filters_of` each member, in the gather; a forward and a
    backward; `take` of each member's gradient, once it is reduced."""

    def __init__(self) -> None:
        self.members: list[Member] = []
        self.alignments: list[tuple[list[Member], JointAlignment]] = []
        self.unsent: dict[Member, Tensor] = {}
        self.versions: dict[Member, tuple[int, ...]] = {}  # when they were aligned
        self.reduced: dict[Member, tuple[Tensor, ReadyEvent]] = {}

    def filters_of(self, member: Member, dtype: torch.dtype | None) -> Tensor:
        """This process's filters, to be gathered; FSDP2 asks for those of each member in turn. dtype: of the message,
        None for the weight's."""
        if member not in self.unsent:
            self._align(dtype)
        return self.unsent.pop(member)

    @torch.no_grad()
    def _align(self, dtype: torch.dtype | None) -> None:
        local = [[None if t is None else _local(t) for t in member.sources()] for member in self.members]
        weights: Any
        gains: Any
        weights, gains = zip(*local, strict=True)
        self.versions, self.alignments = {m: m.version() for m in self.members}, []
        for launch in by_launch(weights):
            members = [self.members[i] for i in launch]
            own = weights[launch[0]].dtype
            _check_dtype(members, own)
            numbers = [m.layer.eps for m in members], [m.layer.scale for m in members]
            to = own if torch.float64 in (own, dtype) else dtype or own  # float64 is aligned to float64 alone
            alignment = JointAlignment([weights[i] for i in launch], [gains[i] for i in launch], *numbers, to)
            filters, alignment.filters = alignment.filters, ()
            self.unsent |= {m: f.to(dtype or own) for m, f in zip(members, filters, strict=True)}
            self.alignments.append((members, alignment))
        for member in self.members:
            member.managed.requires_grad = is_trained(member.layer)

    def take(self, member: Member, grad: Tensor) -> None:
        """FSDP2 calls it on the stream that has reduced the gradient."""
        if not self.reduced:  # for members whose gradient does not come
            queue_callback(self.deliver)
        self.reduced[member] = grad, ReadyEvent(grad.device)
        if len(self.reduced) == sum(m.managed.requires_grad for m in self.members):
            self.deliver()

    @torch.no_grad()
    def deliver(self) -> None:
        """Turns the gradients of filters into those of weights and gains, as FSDP2 delivers them: to `.grad`, then to
        the hooks of the parameter."""
        reduced, self.reduced = self.reduced, {}
        if any(map(self.is_outdated, reduced)):
            raise RuntimeError(
                "wa.fully_shard: weights or gains changed between the gather of their filters and the backward; "
                "change them after the backward, or call reshard() on the module and repeat the forward"
            )
        for filters_grad, ready in reduced.values():
            ready.wait(filters_grad)
        targets: dict[Any, None] = {}
        for members, alignment in self.alignments:
            grads = [reduced[m][0] if m in reduced else None for m in members]
            sources = [t for each in zip(*(m.sources() for m in members), strict=True) for t in each]
            for t, grad in zip(sources, alignment.gradients(grads), strict=True):
                if grad is not None and t.requires_grad:
                    _add(t, grad)
                    targets[t] = None
        for t in targets:
            for hook in (t._post_accumulate_grad_hooks or {}).values():
                hook(t)

    def before_forward(self, module: Any, _: Any) -> None:
        """FSDP2 leaves the root's filters gathered after a forward without a backward. They are outdated if weights
        have changed since, as by load_state_dict: it has to gather them again."""
        if not is_compiling() and any(not m.is_sharded() and self.is_outdated(m) for m in self.members):
            module.reshard()

    def is_outdated(self, member: Member) -> bool:
        return member.version() != self.versions.get(member)


def _local(t: Any) -> Tensor:
    if not hasattr(t, "to_local"):
        raise RuntimeError(
            f"wa.fully_shard: expected weights and gains that stay DTensors, got a {type(t).__name__}: load plain "
            "tensors by torch.distributed.checkpoint.state_dict.set_model_state_dict, or without assign=True"
        )
    return t.to_local()


def _check_dtype(members: list[Member], dtype: torch.dtype) -> None:
    for member in members:
        member.first_dtype = member.first_dtype or dtype
        if member.first_dtype is not dtype:
            raise RuntimeError(
                f"wa.fully_shard: weights were {member.first_dtype} in the first forward, and FSDP2 expects them to "
                f"stay so; got {dtype}: change the dtype before"
            )


def _add(parameter: Any, grad: Tensor) -> None:
    if parameter.grad is None:
        parameter.grad = placed_as(parameter, grad, parameter)
    else:
        parameter.grad.to_local().add_(grad)


class GatheredFilters:
    """Provides one layer's filters, inside the forward and backward of the module that was sharded."""

    name = "fully_shard"

    def __init__(self, member: Member) -> None:
        self.member = member

    @property
    def why(self) -> str:
        return f"where it is sharded, with {len(self.member.group.members) - 1} others, then gathered"

    def __call__(self) -> Any:
        member = self.member
        if member.is_sharded():
            raise RuntimeError(
                "wa.fully_shard: this layer's filters are not gathered; call the module that was sharded, not the layer"
            )
        if not is_compiling() and member.group.is_outdated(member):
            raise RuntimeError(
                "wa.fully_shard: weights or gains changed since their filters were gathered, in this forward; call "
                "reshard() on the module that was sharded, then unshard() or its forward"
            )
        return member.managed
