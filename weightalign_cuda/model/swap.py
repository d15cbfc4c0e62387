"""Replaces layers of a model with new objects of another class that take over their state."""

import types
import weakref
from typing import Any, TypeVar

import torch
import torch.nn.utils.parametrize
from torch import nn

from ..functional.checks import DTYPES, check_module
from ..functional.dtensor import is_sharded

Layer = TypeVar("Layer", bound=nn.Module)
# Wrappers that hold lists of the parameters, or a compiled function, of the layers they found.
_WRAPPERS = {"DistributedDataParallel", "FullyShardedDataParallel", "OptimizedModule"}


def check_model(model: Any) -> None:
    """Checks that the layers of the model can be replaced.

    Raises:
        TypeError: if it is not a torch.nn.Module, or contains scripted or wrapped ones.
    """
    check_module(model)
    for name, module in model.named_modules():
        cls = type(module).__name__
        if isinstance(module, torch.jit.ScriptModule) or cls in _WRAPPERS:
            raise TypeError(
                f"model: expected the model itself, not yet scripted, wrapped or compiled, got {cls} at {name!r}"
            )


def check_plain(name: str, layer: nn.Module, if_sharded: str) -> None:
    """Checks that the layer's weight is a plain parameter and its forward not compiled: what takes their place would
    still refer to the old layer. if_sharded: what to do instead, for the error message.

    Raises:
        TypeError: for an unsupported dtype.
        ValueError: otherwise, saying what was found instead.
    """
    if is_sharded(layer._parameters.values()):
        raise ValueError(f"model: expected a model that is not sharded, got a DTensor at {name!r}; {if_sharded}")
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
    """Whether a forward is set on the object. (accelerate's hooks, when removed, leave the class's method there.)"""
    forward = types.MethodType(type(layer).forward, layer)
    return bool(vars(layer).get("forward", forward) != forward)


def rebuilt(layer: nn.Module, cls: type[Layer]) -> Layer:
    """A `cls` object with the state of `layer`: the same parameters, hooks (so that their handles still work) and mode,
    but without a forward set on the object. __init__ is not run: no random numbers are drawn."""
    new = cls.__new__(cls)
    new.__dict__.update(layer.__dict__)
    new.__dict__.pop("forward", None)
    new._parameters = layer._parameters.copy()
    return new


def put_in_place(model: nn.Module, new: dict[nn.Module, nn.Module]) -> nn.Module:
    """`model` with each key of `new` replaced by its value, both as a submodule and in the other attributes of modules
    (a forward may iterate over a plain list of layers)."""
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
    """Lists and dicts are changed in place, as they may be shared; those without a replaced layer are left alone. seen:
    ids of those visited, as they may contain themselves."""
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
