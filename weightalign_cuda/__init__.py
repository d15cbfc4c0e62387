"""WeightAlign and weight-standardised convolutions at the cost of plain ones.

`align` and `align_foreach` align weights, `prepare` a weight and its convolution's input together, `conv1d`, `conv2d`
and `conv3d` convolve with them; `WAConv2d` and its like are the layers. `convert` swaps those of a model for them,
`explain` says what aligns each, `fold` bakes the aligned weights in, `frozen` keeps them for a while, `accumulate` for
several micro-batches. `backends` says what serves all that on this machine. The formula is that of Shi, Li, Liu, van
Gemert, "WeightAlign: Normalizing Activations by Weight Alignment", arXiv 2010.07160.
"""

from . import folded, layers  # noqa: F401, the names by which users and pickles know the classes
from .functional.alignment import align, align_foreach
from .functional.convolution import conv1d, conv2d, conv3d, prepare
from .model.accumulate import accumulate
from .model.convert import convert
from .model.explain import explain
from .model.fold import fold
from .model.frozen import frozen
from .nn.layers import (
    WAConv1d,
    WAConv2d,
    WAConv3d,
    WAConvTranspose1d,
    WAConvTranspose2d,
    WAConvTranspose3d,
    WALinear,
    gain_parameters,
)
from .ops.backend import backends, use_backend

__version__ = "0.1.0"
__all__ = [
    "WAConv1d",
    "WAConv2d",
    "WAConv3d",
    "WAConvTranspose1d",
    "WAConvTranspose2d",
    "WAConvTranspose3d",
    "WALinear",
    "accumulate",
    "align",
    "align_foreach",
    "backends",
    "conv1d",
    "conv2d",
    "conv3d",
    "convert",
    "explain",
    "fold",
    "frozen",
    "gain_parameters",
    "prepare",
    "use_backend",
]
