"""peft's adapters: small layers beside a base layer that add to its output or work on its weight.

Adapters start as a no-op, with weights of 0, which alignment would blow up at the first step. The base layer may be
aligned if the adapter only calls its forward; but the adapter cannot be merged into a weight that is not aligned yet.
"""

import functools
from collections.abc import Iterable
from typing import Any

from torch import nn

from ..nn.layers import Aligned

# Their forward calls the base layer, and does not read its weight.
_ADDING = {f"peft.tuners.{name}" for name in ("lora", "loha", "lokr", "ia3")}


def tuner_layers(model: nn.Module) -> list[nn.Module]:
    """peft's layers that have a base layer."""
    return [module for module in model.modules() if "base_layer" in module._modules and _is_tuner(module)]


def _is_tuner(module: nn.Module) -> bool:
    classes = type(module).__mro__
    return any(cls.__name__ == "BaseTunerLayer" and cls.__module__.startswith("peft.") for cls in classes)


def not_to_align(tuners: Iterable[nn.Module]) -> dict[nn.Module, str]:
    """All modules below these layers that must not be aligned, and why."""
    reasons: dict[nn.Module, str] = {}
    for tuner in tuners:
        for name, child in tuner.named_children():
            if name != "base_layer":
                reasons |= dict.fromkeys(child.modules(), "peft's adapters")
        adds = type(tuner).__module__.rpartition(".")[0] in _ADDING and not getattr(tuner, "lora_variant", None)
        if not adds:
            reasons[tuner.base_layer] = "peft's adapter works on its weight"  # type: ignore[index]
    return reasons


def forbid_merging(tuners: Iterable[nn.Module]) -> None:
    """Makes merging raise as long as the base layer aligns its weight; once it is folded, merging works."""
    for tuner in tuners:
        for name in ("merge", "unmerge"):
            vars(tuner)[name] = functools.partial(_merged, tuner, name)


def _merged(tuner: Any, name: str, *args: Any, **kwargs: Any) -> None:
    if isinstance(tuner.get_base_layer(), Aligned):
        raise RuntimeError(f"{name}: the base layer is yet to align its weight; wa.fold(model) first, then merge")
    getattr(type(tuner), name)(tuner, *args, **kwargs)
