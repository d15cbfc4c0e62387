"""torch.fx, which takes torch.nn's layers for leaves of a graph, and traces into all others: ours are leaves, too."""

from typing import Any

from torch import nn
from torch.fx import Proxy

__all__ = ["Proxy", "call_module"]


def call_module(layer: nn.Module, input: Proxy, *args: Any) -> Proxy:
    """What the tracer records for a leaf: a call of the layer by its name in the model."""
    tracer: Any = input.tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(layer), (input, *args), {})
