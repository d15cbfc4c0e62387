"""Public functions: they check arguments, choose dtype and layout, and call one op."""

from .alignment import align, align_foreach
from .convolution import conv1d, conv2d, conv3d, prepare

__all__ = ["align", "align_foreach", "conv1d", "conv2d", "conv3d", "prepare"]
