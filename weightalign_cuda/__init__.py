"""WeightAlign and weight-standardised convolutions at the cost of plain ones.

`align` and `align_foreach` are the functions, `WAConv2d` the layer; `backends()` says what serves them here. The
formula is Shi, Li, Liu, van Gemert, "WeightAlign: Normalizing Activations by Weight Alignment", arXiv 2010.07160.
"""

from ._backend import backends, use_backend
from .functional import align, align_foreach
from .layers import WAConv2d

__version__ = "0.1.0"
__all__ = ["WAConv2d", "align", "align_foreach", "backends", "use_backend"]
