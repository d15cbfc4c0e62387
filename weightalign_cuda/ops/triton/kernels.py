# mypy: ignore-errors
"""The two kernels: align_forward and align_backward of a list of weights, each optionally together with a tile-wise
preparation of one convolution's input (FROM is then its dtype).

table: the input's fields, if there is one; for each program of the weights, the offset of its row; the rows.
"""

import triton
import triton.language as tl

from .align_kernels import align_backward, align_forward
from .prepare_kernels import NUMBERS, number, prepare_backward, prepare_forward


@triton.jit
def forward(
    table, statistics,
    WEIGHT: tl.constexpr, ALIGNED: tl.constexpr, ACC: tl.constexpr,
    FROM: tl.constexpr = None, TO: tl.constexpr = None, MODE: tl.constexpr = None, ACTIVATION: tl.constexpr = None,
    FROM_BY_CHANNELS: tl.constexpr = None, TO_BY_CHANNELS: tl.constexpr = None,
    CHANNELS: tl.constexpr = None, POSITIONS: tl.constexpr = None,
):  # fmt: skip
    """Aligned weights and statistics (filters, 2); the prepared input. See the functions it calls."""
    program = tl.program_id(0)
    if FROM is None:
        align_forward(table + tl.load(table + program), statistics, WEIGHT, ALIGNED, ACC)
    elif program < number(table, "align_programs"):
        align_forward(table + tl.load(table + NUMBERS + program), statistics, WEIGHT, ALIGNED, ACC)
    else:
        prepare_forward(
            table, FROM, TO, ACC, MODE, ACTIVATION, FROM_BY_CHANNELS, TO_BY_CHANNELS, CHANNELS, POSITIONS
        )  # fmt: skip


@triton.jit
def backward(
    table, statistics, grad_gain,
    WEIGHT: tl.constexpr, ALIGNED: tl.constexpr, ACC: tl.constexpr,
    FROM: tl.constexpr = None, TO: tl.constexpr = None, SAVED: tl.constexpr = None,
    MODE: tl.constexpr = None, ACTIVATION: tl.constexpr = None,
    FROM_BY_CHANNELS: tl.constexpr = None, TO_BY_CHANNELS: tl.constexpr = None,
    SAVED_BY_CHANNELS: tl.constexpr = None, SAVED_IS_RESULT: tl.constexpr = None,
    CHANNELS: tl.constexpr = None, POSITIONS: tl.constexpr = None,
):  # fmt: skip
    """Gradients of weights and gains (filters,); gradient of the input."""
    program = tl.program_id(0)
    if FROM is None:
        align_backward(table + tl.load(table + program), statistics, grad_gain, WEIGHT, ALIGNED, ACC)
    elif program < number(table, "align_programs"):
        align_backward(table + tl.load(table + NUMBERS + program), statistics, grad_gain, WEIGHT, ALIGNED, ACC)
    else:
        prepare_backward(
            table, FROM, TO, SAVED, ACC, MODE, ACTIVATION, FROM_BY_CHANNELS, TO_BY_CHANNELS, SAVED_BY_CHANNELS,
            SAVED_IS_RESULT, CHANNELS, POSITIONS,
        )  # fmt: skip
