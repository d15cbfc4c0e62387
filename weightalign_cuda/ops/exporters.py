"""Exporters that support only PyTorch's own ops: torch.jit.trace, which tensorboard's graphs and some FLOP counters
use, and both ONNX exporters."""

import torch
from torch.compiler import is_exporting

from ..torch_private import get_tracing_state


def wants_plain_operations() -> bool:
    """Whether one is active: then nothing may depend on a size, which is symbolic, and custom ops are not allowed."""
    return get_tracing_state() is not None or is_onnx_program()


def is_onnx_program() -> bool:
    """Whether torch.export runs for ONNX, whose exporter cannot translate our ops."""
    return is_exporting() and torch.onnx.is_in_onnx_export()
