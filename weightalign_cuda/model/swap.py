"""Another class for a layer: a new object that takes over what the old one holds, put in its place in the model."""

import types
import weakref
from typing import Any, TypeVar

import torch
import torch.nn.utils.parametrize
from torch import nn

from ..functional.checks import DTYPES, check_module

Layer = TypeVar("Layer", bound=nn.Module)
# What keeps lists of the parameters, or a function of the layer, that it found.
_WRAPPERS = {"DistributedDataParallel", "FullyShardedDataParallel", "OptimizedModule"}


def check_model(model: Any) -> None:
    """A model whose layers can be swapped.

    Raises:
        TypeError: for what is no module, and for scripted and wrapped ones.
    """
    check_module(model)
    for name, module in model.named_modules():
        cls = type(module).__name__
        if isinstance(module, torch.jit.ScriptModule) or cls in _WRAPPERS:
            raise TypeError(
                f"model: expected the model itself, not yet scripted, wrapped or compiled, got {cls} at {name!r}"
            )


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
    elif layer.weight.dtype not in DTYPES:
        raise TypeError(
            f"model: expected the weight of {name!r} to be float32, float16, bfloat16 or float64, "
            f"got {layer.weight.dtype}; exclude it"
        )
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


def has_forward_of_its_own(layer: nn.Module) -> bool:
    """One set on the object. (accelerate's hooks, taken off, leave the method of the class there.)"""
    forward = types.MethodType(type(layer).forward, layer)
    return bool(vars(layer).get("forward", forward) != forward)


def rebuilt(layer: nn.Module, cls: type[Layer]) -> Layer:
    """An object of class `cls` with all that `layer` holds: the same parameters, hooks (so that a handle still removes
    its own), mode. No __init__ runs: no random numbers are drawn. A forward set on the object is not among it."""
    new = cls.__new__(cls)
    new.__dict__.update(layer.__dict__)
    new.__dict__.pop("forward", None)
    new._parameters = layer._parameters.copy()
    return new


def put_in_place(model: nn.Module, new: dict[nn.Module, nn.Module]) -> nn.Module:
    """`model` with each layer that is a key of `new` replaced, wherever it stands: as a submodule, and in what modules
    hold beside them (a forward may go through a plain list of its layers)."""
    seen: set[int] = set()
    for module in [*model.modules(), *new.values()]:
        for name, value in list(vars(module).items()):
            replaced = _replaced(value, new, seen)
            if replaced is not value:
                vars(module)[name] = replaced
    for layer in new.values():
        for hook in layer._load_state_dict_pre_hooks.values():
            if getattr(hook, "with_module", False):  # these refer to their layer
                hook.module = weakref.ref(layer)  # type: ignore[attr-defined]
    return new.get(model, model)


def _replaced(value: Any, new: dict[nn.Module, nn.Module], seen: set[int]) -> Any:
    """Lists and dicts are changed in place, for others may hold them, too; those that hold no layer are left alone.
    seen: ids of them, which may hold themselves."""
    if isinstance(value, nn.Module):
        return new.get(value, value)
    if isinstance(value, (list, dict)) and id(value) not in seen:
        seen.add(id(value))
        for key, each in list(value.items() if isinstance(value, dict) else enumerate(value)):
            replaced = _replaced(each, new, seen)
            if replaced is not each:
                value[key] = replaced
    elif type(value) is tuple:
        all_replaced = tuple(_replaced(each, new, seen) for each in value)
        return all_replaced if any(a is not b for a, b in zip(all_replaced, value, strict=True)) else value
    return value
