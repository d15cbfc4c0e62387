"""WeightAlign and weight-standardised convolutions at the cost of plain ones (arXiv 2010.07160): the functions of
weightalign_cuda, and a layer for timm's."""

from . import layers
from .functional import align, align_foreach, conv1d, conv2d, conv3d, prepare
from .ops.backend import backends, use_backend

__all__ = [
    "align",
    "align_foreach",
    "backends",
    "conv1d",
    "conv2d",
    "conv3d",
    "layers",
    "prepare",
    "use_backend",
]
