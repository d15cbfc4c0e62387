"""Other domains made from the same images: what cameras and processing do to them, at one resolution."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor


def grey(pixels: Tensor) -> Tensor:
    return pixels.mean(1, keepdim=True).expand_as(pixels)


def dark(pixels: Tensor) -> Tensor:
    """Half the light."""
    return pixels / 2


def flat(pixels: Tensor) -> Tensor:
    """A third of the contrast, about mid-grey."""
    return (pixels - 128) / 3 + 128


def blurred(pixels: Tensor) -> Tensor:
    """The mean of 3x3 pixels."""
    return F.avg_pool2d(F.pad(pixels, [1] * 4, mode="replicate"), 3, stride=1)


def negative(pixels: Tensor) -> Tensor:
    return 255 - pixels


def unchanged(pixels: Tensor) -> Tensor:
    return pixels


# Of float pixels from 0 to 255.
SHIFTS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": unchanged, "grey": grey, "dark": dark, "flat": flat, "blurred": blurred, "negative": negative
}  # fmt: skip


def shifted(pixels: Tensor, name: str) -> Tensor:
    """uint8 in, uint8 out, as from a file."""
    return SHIFTS[name](pixels.float()).round().clamp(0, 255).byte()
