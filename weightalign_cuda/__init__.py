"""WeightAlign and weight-standardised convolutions at the cost of plain ones.

`align` and `align_foreach` align weights, `prepare` a weight and its convolution's input together, `conv1d`, `conv2d`
and `conv3d` convolve with them; `WAConv2d` and its like are the layers; `backends()` says what serves them here. The
formula is Shi, Li, Liu, van Gemert, "WeightAlign: Normalizing Activations by Weight Alignment", arXiv 2010.07160.
"""

from ._backend import backends, use_backend
from .convert import convert
from .convolution import conv1d, conv2d, conv3d, prepare
from .functional import align, align_foreach
from .layers import (
    WAConv1d,
    WAConv2d,
    WAConv3d,
    WAConvTranspose1d,
    WAConvTranspose2d,
    WAConvTranspose3d,
    WALinear,
    gain_parameters,
)

__version__ = "0.1.0"
__all__ = [
    "WAConv1d",
    "WAConv2d",
    "WAConv3d",
    "WAConvTranspose1d",
    "WAConvTranspose2d",
    "WAConvTranspose3d",
    "WALinear",
    "align",
    "align_foreach",
    "backends",
    "conv1d",
    "conv2d",
    "conv3d",
    "convert",
    "gain_parameters",
    "prepare",
    "use_backend",
]
