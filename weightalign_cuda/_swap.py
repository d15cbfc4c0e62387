"""Another class for a layer: a new object that takes over what the old one holds, put in its place in the model."""

import weakref
from typing import TypeVar

import torch.nn.utils.parametrize
from torch import nn

Layer = TypeVar("Layer", bound=nn.Module)


def check_plain(name: str, layer: nn.Module) -> None:
    """The layer's weight must be a parameter and nothing more, which every use of the new layer finds as it is."""
    weight = layer._parameters.get("weight")
    hooks = [type(hook) for hook in layer._forward_pre_hooks.values()]
    makers = [hook.__name__ for hook in hooks if hook.__module__.startswith("torch.nn.utils.")]
    if torch.nn.utils.parametrize.is_parametrized(layer):
        got = "a layer parametrized by torch.nn.utils.parametrize"
    elif makers:
        got = f"one that torch.nn.utils makes anew before each forward ({', '.join(makers)})"
    elif type(weight) is not nn.Parameter:
        got = f"{type(layer.weight).__module__}.{type(layer.weight).__name__}"
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
