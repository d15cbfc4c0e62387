"""Import path of `weightalign_cuda.nn.layers` for users and existing pickles."""

from .nn.layers import (
    Aligned,
    WAConv1d,
    WAConv2d,
    WAConv3d,
    WAConvTranspose1d,
    WAConvTranspose2d,
    WAConvTranspose3d,
    WALinear,
    aligned_layers,
    gain_parameters,
)

__all__ = [
    "Aligned",
    "WAConv1d",
    "WAConv2d",
    "WAConv3d",
    "WAConvTranspose1d",
    "WAConvTranspose2d",
    "WAConvTranspose3d",
    "WALinear",
    "aligned_layers",
    "gain_parameters",
]
