"""The functions that users call: arguments are checked, dtype and layout chosen, one op called."""

from .alignment import align, align_foreach
from .convolution import conv1d, conv2d, conv3d, prepare

__all__ = ["align", "align_foreach", "conv1d", "conv2d", "conv3d", "prepare"]
