"""How each layer of a model is aligned, and why."""

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from ..functional.alignment import by_launch
from ..functional.checks import check_module
from ..nn.layers import Aligned, aligned_layers
from .fingerprint import why_not_plain
from .foreach import Foreach, buckets, may_take_part
from .foreach_source import ForeachSource
from .select import filter_count, filter_length, select


class LayerExplanation(NamedTuple):
    """One layer of a model."""

    name: str  # as in model.named_modules()
    layer: str  # its class
    filters: tuple[int, int]  # their number, and the values in each: 0 in a lazy layer before its first input
    aligned: str  # "together", "alone", "no", or "by" what provides the filters
    why: str


class Explanation(tuple[LayerExplanation, ...]):
    """The layers of a model, in its order; prints as a table."""

    def __str__(self) -> str:
        header = LayerExplanation("name", "layer", ("filters", "values"), "aligned", "why")  # type: ignore[arg-type]
        rows = [(row.name, row.layer, *map(str, row.filters), row.aligned, row.why) for row in (header, *self)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        )

    __repr__ = __str__


def explain(model: nn.Module) -> Explanation:
    """How each layer of the model is aligned, and why: `print(wa.explain(model))`, or iterate over the result.

    It describes a forward of the model started now. A layer with foreach also aligns itself if its weight or the
    autocast dtype changes during the forward, in the second run of reentrant checkpointing, under torch.func, or if a
    part of the model is called alone: the logger "weightalign_cuda" then gives the reason at level DEBUG.

    Args:
        model: any module.

    Returns:
        A tuple with one `LayerExplanation` (name, layer, filters, aligned, why) for each layer of this package and each
        plain convolution. `aligned` is "together" (one launch with others), "alone" (a launch of its own), "by frozen"
        or "by accumulate" (inside these contexts), "by fully_shard", or "no".

    Raises:
        TypeError: for a model that is not a torch.nn.Module.
    """
    check_module(model)
    found = dict(_aligned(model)) | dict(_plain(model))
    return Explanation(
        LayerExplanation(name, type(layer).__name__, _size(layer), *found[layer])
        for name, layer in model.named_modules()
        if layer in found
    )


def _size(layer: nn.Module) -> tuple[int, int]:
    return filter_count(layer), 0 if isinstance(layer, LazyModuleMixin) else filter_length(layer)


def _aligned(model: nn.Module) -> Iterator[tuple[nn.Module, tuple[str, str]]]:
    """The layers of this package; if models with foreach are nested, layers belong to the outermost one."""
    together: dict[Aligned, str] = {}
    for name, root in model.named_modules():
        foreach = root.__dict__.get("_foreach")
        if isinstance(foreach, Foreach):
            layers = [
                layer for layer in aligned_layers(root.modules()) if layer not in together and may_take_part(layer)
            ]
            launches = [
                [bucket[i] for i in members]
                for bucket in buckets(layers, foreach.buckets)
                for members in by_launch([layer.weight for layer in bucket])
            ]
            for i, launch in enumerate(launches, 1):
                where = f"launch {i} of {len(launches)}, with {len(launch) - 1} others, by foreach"
                together |= dict.fromkeys(launch, f"{where} of {name!r}" if name else where)
    without = "it is not in a part with foreach" if together else "foreach is off: wa.convert(model, foreach=True)"
    for layer in aligned_layers(model.modules()):
        if layer in together:
            yield layer, ("together", together[layer])
        elif layer.aligned_by is None or isinstance(layer.aligned_by, ForeachSource):
            yield layer, ("alone", why_not_plain(layer) or without)
        else:
            source = getattr(layer.aligned_by, "name", repr(layer.aligned_by))
            yield layer, (f"by {source}", getattr(layer.aligned_by, "why", "its filters are kept"))


def _plain(model: nn.Module) -> Iterator[tuple[nn.Module, tuple[str, str]]]:
    """Convolutions that are not layers of this package."""
    names = {name: module for name, module in model.named_modules(remove_duplicate=False)}
    try:
        selection = select(model, None, None)
    except (TypeError, ValueError) as error:  # convert would raise it
        for module in model.modules():
            if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and not isinstance(module, Aligned):
                yield module, ("no", str(error))
        return
    for reason, of_these in (selection.skipped | selection.unknown).items():
        for name in of_these:
            yield names[name], ("no", reason)
    for module in selection.chosen:
        yield module, ("no", "wa.convert(model) would convert it")
