"""Layers whose forward takes the place of that of a class elsewhere, whose attributes they use."""

from torch import Tensor, nn

from .functional import conv2d


class ScaledStdConv2d(nn.Module):
    """timm's: the weight is gain * scale * (w - mean) / sqrt(var + eps)."""

    can_torch_compile: bool = True

    weight: Tensor
    gain: Tensor
    bias: Tensor | None
    scale: float
    eps: float
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    def forward(self, x: Tensor) -> Tensor:
        half = self.weight[0].numel() / 2  # numerator and denominator are multiplied by its root
        sizes = self.stride, self.padding, self.dilation, self.groups
        eps, scale = half * self.eps, half**0.5 * self.scale
        return conv2d(x, self.weight, self.bias, *sizes, gain=self.gain, eps=eps, scale=scale)
