"""Folded layers with an activation or TensorFlow's padding: torch.nn's layers plus these, in PyTorch's own ops."""

from typing import Any

from torch import Tensor, nn

from ..functional.padding import same_tf_padding
from ..ops.reference.activations import activate
from ..ops.reference.prepare import pad
from .fx import Proxy, call_module


class Folded(nn.Module):
    """A torch.nn layer that first applies an activation and TensorFlow's padding to its input."""

    activation: str | None
    pads_same: bool

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if isinstance(input, Proxy):
            return call_module(self, input, *args)
        input = activate(input, self.activation)
        if self.pads_same:
            kernel: Any = self.kernel_size
            sizes: Any = kernel, self.stride, self.dilation
            pairs = same_tf_padding(input.shape[-len(kernel) :], *sizes)
            input = pad(input, [n for pair in pairs for n in pair], self.padding_mode)  # type: ignore[arg-type]
        return super().forward(input, *args, **kwargs)

    def extra_repr(self) -> str:
        padding = ", padding=same_tf" if self.pads_same else ""
        activation = f", activation={self.activation}" if self.activation else ""
        return f"{super().extra_repr()}{padding}{activation}"


class FoldedConv1d(Folded, nn.Conv1d):
    """A folded `WAConv1d` with an activation or TensorFlow's padding."""


class FoldedConv2d(Folded, nn.Conv2d):
    """A folded `WAConv2d` with an activation or TensorFlow's padding."""


class FoldedConv3d(Folded, nn.Conv3d):
    """A folded `WAConv3d` with an activation or TensorFlow's padding."""


class FoldedConvTranspose1d(Folded, nn.ConvTranspose1d):
    """A folded `WAConvTranspose1d` with an activation."""


class FoldedConvTranspose2d(Folded, nn.ConvTranspose2d):
    """A folded `WAConvTranspose2d` with an activation."""


class FoldedConvTranspose3d(Folded, nn.ConvTranspose3d):
    """A folded `WAConvTranspose3d` with an activation."""


class FoldedLinear(Folded, nn.Linear):
    """A folded `WALinear` with an activation."""


FOLDED: dict[type[nn.Module], type[Folded]] = {
    nn.Conv1d: FoldedConv1d,
    nn.Conv2d: FoldedConv2d,
    nn.Conv3d: FoldedConv3d,
    nn.ConvTranspose1d: FoldedConvTranspose1d,
    nn.ConvTranspose2d: FoldedConvTranspose2d,
    nn.ConvTranspose3d: FoldedConvTranspose3d,
    nn.Linear: FoldedLinear,
}
