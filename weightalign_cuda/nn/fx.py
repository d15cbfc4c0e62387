"""torch.fx treats torch.nn's layers as leaf modules and traces into all others: this makes ours leaves, too."""

from typing import Any

from torch import nn
from torch.fx import Proxy

__all__ = ["Proxy", "call_module"]


def call_module(layer: nn.Module, input: Proxy, *args: Any) -> Proxy:
    """What the tracer records for a leaf module: a call by its qualified name."""
    tracer: Any = input.tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(layer), (input, *args), {})
