"""Convolutions whose weights are aligned before use."""

from typing import Any

from torch import Tensor, nn

from ._checks import check_number
from .functional import align


class WAConv2d(nn.Conv2d):
    """`torch.nn.Conv2d` on aligned weights, with a learnable gain for each output channel.

    Shapes, arguments and initialisation are those of `torch.nn.Conv2d`; the alignment makes the result independent of
    the scale of `weight`.

    Args:
        eps: added to n/2 * var of each filter; see `weightalign_cuda.align`.
        scale: a constant factor of the aligned weight.

    Attributes:
        weight: (C_out, C_in / groups, kH, kW), not aligned.
        gain: (C_out,), starts at 1.
        bias: (C_out,) or None.

    Raises:
        TypeError, ValueError: for eps and scale as `align`; else as `torch.nn.Conv2d`.
    """

    def __init__(self, *args: Any, eps: float = 1e-5, scale: float = 1.0, **kwargs: Any) -> None:
        check_number("eps", eps, positive=True)
        check_number("scale", scale)
        super().__init__(*args, **kwargs)
        self.eps = eps
        self.scale = scale
        self.gain = nn.Parameter(self.weight.new_ones(self.out_channels))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if hasattr(self, "gain"):
            nn.init.ones_(self.gain)

    def forward(self, input: Tensor) -> Tensor:
        weight = align(self.weight, self.gain, eps=self.eps, scale=self.scale)
        return self._conv_forward(input, weight, self.bias)

    def extra_repr(self) -> str:
        scale = f", scale={self.scale:g}" if self.scale != 1 else ""
        return f"{super().extra_repr()}, eps={self.eps:g}{scale}"  # type: ignore[no-untyped-call]
