"""Rejects models whose layers never have all their parameters at once: they cannot be aligned together."""

from collections.abc import Sequence

from torch import nn

_REASONS = {
    "FSDPModule": "FSDP2 gathers a layer's parameters only around that layer's own forward and backward",
    "FullyShardedDataParallel": "FSDP gathers a layer's parameters only around that layer's own forward and backward",
    "DataParallel": "torch.nn.DataParallel runs copies of the layers, on other threads and devices",
}


def check_unsharded(modules: Sequence[nn.Module], what: str, instead: str) -> None:
    """modules: all of a model, itself first. `what` cannot be done, do it `instead`: for the error message.

    Raises:
        RuntimeError: if the model is sharded or replicated, saying how.
    """
    reason = _REASONS["DataParallel"] if "_is_replica" in modules[0].__dict__ else None
    for cls in set(map(type, modules)):
        reason = reason or _reason(cls)
    if reason:
        raise RuntimeError(f"{what}, as {reason}; {instead}")


def _reason(cls: type) -> str | None:
    return next((_REASONS[base.__name__] for base in cls.__mro__ if base.__name__ in _REASONS), None)
