"""Access to a module's parameters without the 1.5 us of `module.weight`: torch.nn.Module looks them up only after
Python has found no attribute and raised an exception."""

from typing import Any

from torch import nn


def parameter(module: nn.Module, name: str) -> Any:
    """The parameter of this name, or what has replaced it (a parametrization, pruning)."""
    parameters = module._parameters
    return parameters[name] if name in parameters else getattr(module, name)
