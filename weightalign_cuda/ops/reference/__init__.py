"""The ops in plain PyTorch: the reference for all backends, on every device, differentiable any number of times."""

from .align import align_backward, align_forward
from .prepare import prepare_backward, prepare_forward

__all__ = ["align_backward", "align_forward", "prepare_backward", "prepare_forward"]
