"""Which layers of a model are converted, which are left and why, and which cannot be converted."""

import fnmatch
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any, NamedTuple, cast

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from ..nn.layers import (
    Aligned,
    WAConv1d,
    WAConv2d,
    WAConv3d,
    WAConvTranspose1d,
    WAConvTranspose2d,
    WAConvTranspose3d,
    WALinear,
)
from .adapters import not_to_align, tuner_layers
from .heads import predicting
from .standardised import SAME, class_name, is_standardised, original
from .swap import check_plain, has_forward_of_its_own, rebuilt

Rule = str | Sequence[str] | Callable[[str, nn.Module], bool] | None

CLASSES: dict[type[nn.Module], type[Aligned]] = {
    nn.Conv1d: WAConv1d,
    nn.Conv2d: WAConv2d,
    nn.Conv3d: WAConv3d,
    nn.ConvTranspose1d: WAConvTranspose1d,
    nn.ConvTranspose2d: WAConvTranspose2d,
    nn.ConvTranspose3d: WAConvTranspose3d,
    nn.Linear: WALinear,
}


def torch_class(module: nn.Module) -> type[nn.Module]:
    return next(cls for cls in type(module).__mro__ if cls in CLASSES)


def filter_count(layer: nn.Module) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels  # type: ignore[return-value]


def filter_length(layer: nn.Module) -> int:
    """n, the number of values of one filter."""
    return layer.weight.numel() // max(filter_count(layer), 1)  # type: ignore[operator]


class Selection(NamedTuple):
    chosen: dict[nn.Module, str]  # the layers to convert, with their names
    skipped: dict[str, list[str]]  # reason -> names of layers left plain, where one might expect otherwise
    unknown: dict[str, list[str]]  # the same, for layers whose computation is unknown


def select(model: nn.Module, include: Rule, exclude: Rule) -> Selection:
    """Decides what happens to each layer of the model.

    Raises:
        TypeError, ValueError: for invalid rules or patterns without a match, and for layers that cannot be converted.
    """
    _check_rule("include", include)
    _check_rule("exclude", exclude)
    names = _names(model)
    if isinstance(include, (str, list, tuple)):
        _check_patterns(include, names)
    kept = not_to_align(tuner_layers(model))
    if include is None:
        kept |= _not_by_default(model, names, kept)
    selection = Selection({}, {}, {})
    for module, own in names.items():
        if isinstance(module, Aligned) or not _matches(include, module, own) or _matches(exclude, module, own, False):
            continue
        parent = model.get_submodule(own[0].rpartition(".")[0])
        reason = kept[module] if module in kept else _reason_to_leave(module, parent)
        if reason:
            selection.skipped.setdefault(reason, []).append(own[0])
        elif reason is None and (what := _own_forward(module)):
            selection.unknown.setdefault(what, []).append(own[0])
        elif reason is None:
            check_plain(own[0], original(module), "convert it before sharding")
            selection.chosen[module] = own[0]
    return selection


def _names(model: nn.Module) -> dict[nn.Module, list[str]]:
    """All layers that are or may become ours, with all their names: a layer may be shared."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        cls: type = type(module)
        if cls.__module__.startswith("torch.ao.nn.") and "Conv" in cls.__name__:
            raise TypeError(f"model: expected floating-point layers, got {class_name(module)} at {name!r}")
        if isinstance(module, (Aligned, *_LAYERS)):
            names.setdefault(cast(nn.Module, module), []).append(name)
    return names


_LAYERS: tuple[type[nn.Module], ...] = tuple(CLASSES)


def _check_rule(name: str, rule: Any) -> None:
    is_list = isinstance(rule, (list, tuple)) and all(isinstance(pattern, str) for pattern in rule)
    if not (rule is None or isinstance(rule, str) or is_list or callable(rule)):
        raise TypeError(
            f"{name}: expected a name pattern, a list of them or a function (name, module) -> bool, got {rule!r}"
        )


def _check_patterns(include: str | Sequence[str], names: dict[nn.Module, list[str]]) -> None:
    flat = [name for own in names.values() for name in own]
    for pattern in [include] if isinstance(include, str) else include:
        if not fnmatch.filter(flat, pattern):
            raise ValueError(f"include: {pattern!r} matches none of the layers {', '.join(flat[:5])}, ...")


def _matches(rule: Rule, module: nn.Module, names: Sequence[str], default: bool = True) -> bool:
    if rule is None:
        return default
    if callable(rule):
        return any(rule(name, module) for name in names)
    patterns = [rule] if isinstance(rule, str) else rule
    return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _not_by_default(
    model: nn.Module, names: Iterable[nn.Module], adapters: Container[nn.Module]
) -> dict[nn.Module, str]:
    """Layers that only `include` converts, and why; "" where nobody would expect a conversion."""
    reasons = {module: "" for module in names if isinstance(module, nn.Linear)}
    layers = [module for module in names if module not in adapters]
    # A constant factor or no gain: converted earlier, from another weight standardisation.
    others = (m for m in layers if isinstance(m, Aligned) and (m.scale != 1 or m.gain is None))
    if any(map(is_standardised, layers)) or any(others):
        plain = "plain in a model that standardises weights"
        return {m: plain for m in layers if not is_standardised(m)} | reasons
    return dict.fromkeys(predicting(model, layers, adapters), "predictions") | reasons


def _reason_to_leave(module: nn.Module, parent: nn.Module) -> str | None:
    if isinstance(module, LazyModuleMixin):
        return "not initialised yet"
    if filter_length(module) == 1:
        return "filters of one value, which would be constant 0"
    if not is_standardised(module) and _is_constant(module):
        return "frozen filters that are all the same, a constant"
    if isinstance(parent, (nn.MultiheadAttention, nn.TransformerEncoderLayer)):
        return f"its weight is used by {type(parent).__name__} itself"
    return None


def _own_forward(module: nn.Module) -> str:
    if has_forward_of_its_own(module):
        return "a forward set on the object, as accelerate's hooks are: convert before"
    if is_standardised(module) or class_name(module) == SAME:
        return ""
    own = overridden_methods(module, torch_class(module))
    return f"{class_name(module)} has its own {', '.join(sorted(own))}" if own else ""


def _is_constant(module: nn.Module) -> bool:
    """Such as YOLO's expectation over bins, one filter of 0, 1, 2, ..., and blurs, one filter for all channels."""
    weight = module._parameters.get("weight")
    if isinstance(module, nn.Linear) or type(weight) is not nn.Parameter or weight.requires_grad:
        return False
    filters = rebuilt(module, CLASSES[torch_class(module)]).filters()
    return len(filters) == 1 or (not weight.is_meta and bool((filters == filters[:1]).all()))


def overridden_methods(module: nn.Module, base: type[nn.Module]) -> set[str]:
    """Methods overridden relative to `base`: with any, it is unknown what the module computes."""
    subclasses = type(module).__mro__[: type(module).__mro__.index(base)]
    names = {name for cls in subclasses for name, value in vars(cls).items() if callable(value) and hasattr(base, name)}
    own = {name for name in names if not name.startswith("__") or name == "__call__"} - {
        "extra_repr",
        "reset_parameters",
    }
    return own | ({"forward"} if has_forward_of_its_own(module) else set())
