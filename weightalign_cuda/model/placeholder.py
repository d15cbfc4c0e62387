"""The parameter that FSDP2 manages in place of a layer's weight and gain: it has no data, only what is to be gathered
and where reduced gradients go."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..torch_private import tree_leaves, tree_map_only

if TYPE_CHECKING:
    from .shard_group import Member


class Placeholder(Tensor):
    """A tensor of a weight's shape without memory. FSDP2 shards it as any parameter; then it asks each shard, through
    the two methods that it defines for tensor subclasses, what to send in the shard's place."""

    @staticmethod
    def __new__(cls: Any, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Any:
        return Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({tuple(self.shape)}, {self.dtype}, {self.device})"

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """What FSDP2 does to shard a parameter (chunks, views, padding, copies), on shapes alone."""
        if op is torch.ops.aten.copy_.default:
            return args[0]
        device = next(t.device for t in tree_leaves(args) if isinstance(t, cls))
        args, kwargs = tree_map_only(cls, _on_meta, (args, dict(kwargs or {})))
        device = kwargs.pop("device", None) or device
        return tree_map_only(Tensor, lambda t: cls(t.shape, t.dtype, device), op(*args, **kwargs))

    def fsdp_pre_all_gather(
        self, mesh: Any, outer_size: torch.Size, outer_stride: Any, module: "Member", mp_policy: Any
    ) -> tuple[tuple[Tensor], None]:
        """FSDP2 wants as many rows from each process, the last ones padded."""
        filters = module.group.filters_of(module, mp_policy.param_dtype)
        missing = -(-outer_size[0] // mesh.size()) - filters.shape[0]
        if missing:
            filters = torch.cat([filters, filters.new_zeros(missing, *filters.shape[1:])])
        return (filters,), None

    def fsdp_post_all_gather(
        self, gathered: tuple[Tensor], _: None, param_dtype: torch.dtype, *, out: Tensor | None = None
    ) -> tuple[Tensor, tuple[()]] | None:
        """The gathered tensor is the parameter that layers use: FSDP2 itself allocates and frees it."""
        return (gathered[0], ()) if out is None else None


def _on_meta(t: Placeholder) -> Tensor:
    return torch.empty(t.shape, dtype=t.dtype, device="meta")
