"""Many weights aligned in one launch outside of autograd, for filters that outlive a graph."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..functional.checks import device_type
from ..ops.autograd import in_their_places, of_used
from ..ops.backend import serving
from .streams import ReadyEvent


class JointAlignment:
    """Weights of one device and dtype with their gains: one launch now, and one for the gradients, by the same backend.

    What it makes are not inference tensors: they may be used after an inference mode has ended.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        gains: Sequence[Tensor | None],
        eps: Sequence[float],
        scales: Sequence[float],
        dtype: torch.dtype,
    ) -> None:
        self.tensors = *weights, *gains
        self.scales = scales
        self.served = serving(device_type(weights[0]))
        with torch.inference_mode(False), torch.no_grad():
            options = eps, scales, dtype, torch.preserve_format
            self.filters, self.statistics = self.served.align_forward(list(weights), list(gains), *options)
        self.ready = ReadyEvent(weights[0].device)

    def gradients(self, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Of weights, then of gains, from those of the filters; None for filters without."""
        used = [i for i, grad in enumerate(grads) if grad is not None]
        if not used:
            return [None] * len(self.tensors)
        self.ready.wait(self.statistics)
        with torch.no_grad():
            results = self.served.align_backward(*of_used(used, grads, self.tensors, self.statistics, self.scales))
            return in_their_places(used, self.tensors, *results)
