"""WeightAlign and weight-standardised convolutions at the cost of plain ones.

Functions: `align` and `align_foreach` align weights; `prepare` aligns a weight and prepares its convolution's input;
`conv1d`, `conv2d` and `conv3d` convolve the two. Layers: `WAConv2d` and its siblings. Models: `convert` replaces a
model's layers with these, `explain` shows how each one is aligned, `fold` bakes the aligned weights in, `frozen` caches
them for inference, `accumulate` shares them between micro-batches. `backends` lists what is available on this machine.
Formula: Shi, Li, Liu, van Gemert, "WeightAlign: Normalizing Activations by Weight Alignment", arXiv 2010.07160.
"""

from . import folded, layers  # noqa: F401, import paths for users and existing pickles
from .functional.alignment import align, align_foreach
from .functional.convolution import conv1d, conv2d, conv3d, prepare
from .model.accumulate import accumulate
from .model.convert import convert
from .model.explain import explain
from .model.fold import fold
from .model.frozen import frozen
from .model.fully_shard import fully_shard
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
    "fully_shard",
    "gain_parameters",
    "prepare",
    "use_backend",
]
