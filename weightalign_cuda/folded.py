"""Import path of `weightalign_cuda.nn.folded` for users and existing pickles."""

from .nn.folded import (
    FoldedConv1d,
    FoldedConv2d,
    FoldedConv3d,
    FoldedConvTranspose1d,
    FoldedConvTranspose2d,
    FoldedConvTranspose3d,
    FoldedLinear,
)

__all__ = [
    "FoldedConv1d",
    "FoldedConv2d",
    "FoldedConv3d",
    "FoldedConvTranspose1d",
    "FoldedConvTranspose2d",
    "FoldedConvTranspose3d",
    "FoldedLinear",
]
