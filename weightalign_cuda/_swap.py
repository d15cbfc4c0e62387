"""Another class for a layer: a new object that takes over what the old one holds, put in its place in the model."""

import weakref
from typing import TypeVar

import torch
import torch.nn.utils.parametrize
from torch import nn

Layer = TypeVar("Layer", bound=nn.Module)


def check_plain(name: str, layer: nn.Module) -> None:
    """The layer's weight must be a parameter and nothing more, and its forward not compiled: what stands for it now
    would go on referring to the old layer.

    Raises:
        ValueError: saying what it is instead.
    """
    hooks = [type(hook) for hook in layer._forward_pre_hooks.values()]
    makers = [hook.__name__ for hook in hooks if hook.__module__.startswith("torch.nn.utils.")]
    if torch.nn.utils.parametrize.is_parametrized(layer):
        got = "a layer parametrized by torch.nn.utils.parametrize"
    elif type(layer._parameters.get("weight")) is not nn.Parameter:
        got = f"one that {', '.join(makers)} makes" if makers else f"a {torch.typename(layer.weight)}"
    elif layer._compiled_call_impl is not None:
        raise ValueError(f"model: expected layers that are not compiled, got {name!r}; compile afterwards")
    else:
        return
    raise ValueError(
        f"model: expected the weight of {name!r} to be a plain torch.nn.Parameter, got {got}; undo that first "
        "(remove_parametrizations, remove_weight_norm, prune.remove, ...)"
    )


def rebuilt(layer: nn.Module, cls: type[Layer]) -> Layer:
    """An object of class `cls` with all that `layer` holds: the same parameters, hooks (so that a handle still removes
    its own), mode. No __init__ runs: no random numbers are drawn."""
    new = cls.__new__(cls)
    new.__dict__.update(layer.__dict__)
    new._parameters = layer._parameters.copy()
    for hook in new._load_state_dict_pre_hooks.values():
        if getattr(hook, "with_module", False):  # these refer to their layer
            hook.module = weakref.ref(new)  # type: ignore[attr-defined]
    return new


def put_in_place(model: nn.Module, new: dict[nn.Module, nn.Module]) -> nn.Module:
    """`model` with each layer that is a key of `new` replaced, wherever it stands."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in new:
                parent._modules[name] = new[child]
    return new.get(model, model)
