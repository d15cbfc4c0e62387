"""Exporters that know only PyTorch's own operations: torch.jit.trace, behind which tensorboard's graphs and some FLOP
counters stand, and both of ONNX's."""

import torch
from torch.compiler import is_exporting

from ..torch_private import get_tracing_state


def wants_plain_operations() -> bool:
    """Whether one of them is looking: nothing may then depend on a size, which is a symbol, nor be an op of ours."""
    return get_tracing_state() is not None or is_onnx_program()


def is_onnx_program() -> bool:
    """Whether torch.export runs for ONNX, whose exporter has no translation of our ops."""
    return is_exporting() and torch.onnx.is_in_onnx_export()
