"""A module's parameters, without the microsecond and a half that `module.weight` takes: torch.nn.Module looks for them
only where Python has found no attribute, and has made an exception of that."""

from typing import Any

from torch import nn


def parameter(module: nn.Module, name: str) -> Any:
    """The attribute of this name: a parameter, or what has replaced it (a parametrization, pruning)."""
    parameters = module._parameters
    return parameters[name] if name in parameters else getattr(module, name)
